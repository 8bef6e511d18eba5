"""The page's server: this computer only, two questions, and one clear sentence for everything else."""

import base64
import hashlib
import json
import os
import re
import socketserver
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mini_ht.demo.messages import Refused, read_adapt, read_predict
from mini_ht.demo.tasks import Tasks
from mini_ht.errors import InputError

ADDRESS = "127.0.0.1"
BODY = 256_000  # bytes of a message, at most
IDLE = 10.0  # seconds without a byte after which a connection is closed
PATHS = {"/": "GET", "/adapt": "POST", "/predict": "POST"}


class DemoServer(ThreadingHTTPServer):
    """Serves the page and its questions at `url`; a thread a connection.

    port 0 takes any that is free. Raises InputError for a port that cannot be had.
    """

    daemon_threads = True
    allow_reuse_address = os.name == "posix"  # elsewhere it would let two programs share a port
    server_bind = socketserver.TCPServer.server_bind  # http.server's asks the network for this computer's name

    def __init__(self, tasks: Tasks, port: int):
        if not 0 <= port <= 65535:
            raise InputError(f"port is {port}; choose one from 1024 to 65535")
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise InputError(
                f"cannot use port {port} ({error.strerror}); stop the program that has it, "
                "or choose another from 1024 to 65535, such as --port 8765"
            ) from error
        port = self.server_address[1]
        self.tasks, self.url = tasks, f"http://{ADDRESS}:{port}/"
        self.hosts = {f"{name}:{port}" for name in (ADDRESS, "localhost")}
        if port == 80:  # which browsers leave out
            self.hosts |= {ADDRESS, "localhost"}
        text = Path(__file__).with_name("page.html").read_text("utf-8")
        self.page = text.replace("@CLASSES@", str(tasks.most_classes)).encode()
        self.fixed_headers = fixed_headers(self.page)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed meanwhile is no error; anything else is shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection: GET / is the page, POST /adapt and /predict are questions in JSON."""

    server: DemoServer
    server_version, sys_version = "mini_ht", ""
    protocol_version = "HTTP/1.1"  # keeps the connection, which saves time at every question
    disable_nagle_algorithm = True
    timeout = IDLE

    def do_GET(self) -> None:
        """The page."""
        self.serve(lambda: self.answer(200, self.server.page, "text/html; charset=utf-8"))

    def do_POST(self) -> None:
        """The answer to a question."""
        self.serve(self.answer_question)

    def serve(self, action: Callable[[], None]) -> None:
        """Checks who asks and for what, then does it; a refusal ends the connection."""
        try:
            self.check_origin()
            if self.path not in PATHS:
                raise Refused(404, f"there is nothing at this address; the page is {self.server.url}")
            if PATHS[self.path] != self.command:
                raise Refused(405, f"{self.path} answers {PATHS[self.path]} only")
            action()
        except InputError as error:
            self.send_error(getattr(error, "status", 400), str(error))

    def check_origin(self) -> None:
        """Refuses other names for this computer (DNS rebinding) and pages from elsewhere."""
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            raise Refused(403, f"this server answers to its own address only; open {self.server.url}")
        site = self.headers.get("Sec-Fetch-Site", "none")
        foreign = [origin for origin in origins if origin.lower() not in {f"http://{x}" for x in self.server.hosts}]
        # A link from elsewhere may lead to the page; nothing else may come from there.
        if foreign or (self.command == "POST" and site not in ("same-origin", "none")):
            raise Refused(403, f"this came from another page; open {self.server.url} and ask from there")

    def answer_question(self) -> None:
        """Reads a message, within its limits, and answers it in JSON."""
        body = self.read_body()
        tasks = self.server.tasks
        if self.path == "/adapt":
            reply = tasks.adapt(read_adapt(body, tasks.most_classes))
        else:
            reply = tasks.predict(*read_predict(body))
        self.answer(200, json.dumps(reply).encode(), "application/json")

    def read_body(self) -> bytes:
        """The message; refused by its headers before anything of it is read."""
        if self.headers.get_content_type() != "application/json" or "Content-Type" not in self.headers:
            raise Refused(415, "send the message with Content-Type: application/json")
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or len(lengths) != 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
            raise Refused(411, "send the message in one piece, with one Content-Length")
        if (length := int(lengths[0])) > BODY:
            raise Refused(413, f"the message has {length} bytes, at most {BODY} are taken; clear some drawings")
        body = self.rfile.read(length)
        if len(body) < length:
            raise Refused(400, f"the message has {length} bytes by its headers, {len(body)} came; send it again")
        return body

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A refusal: a 4xx status with one sentence as {"error": ...}. http.server calls this, too."""
        status = code if code < 500 else 405 if code == 501 else 400  # 501: a method that is not known
        self.close_connection = True  # what is left of the request must not be taken for the next one
        self.answer(status, json.dumps({"error": message or "not understood"}).encode(), "application/json")

    def answer(self, status: int, body: bytes, kind: str) -> None:
        """Sends a whole response."""
        self.request_version = self.protocol_version  # a client that says HTTP/0.9 gets a status and headers, too
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), **self.server.fixed_headers}
        headers |= {"Connection": "close"} if self.close_connection else {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: what is drawn here concerns nobody."""


def fixed_headers(page: bytes) -> dict[str, str]:
    """Headers of every answer; their Content-Security-Policy lets the page's own script and style run, and no more."""

    def digest(tag: bytes) -> str:
        (text,) = re.findall(b"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"

    own = f"default-src 'none'; script-src {digest(b'script')}; style-src {digest(b'style')}; connect-src 'self'"
    return {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
        "Content-Security-Policy": f"{own}; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    }
