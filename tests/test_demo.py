"""The demo's drawings, messages and server: what it answers, and one sentence for all that it refuses."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from itertools import combinations

import numpy as np
import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_ht import Config, InputError, draw_parameters, load_pretrained, save
from mini_ht.cli_demo import Demo, demo
from mini_ht.demo.drawing import strokes_to_ink
from mini_ht.demo.messages import CLASSES, DRAWINGS, POINTS, STROKES, Refused, read_adapt, read_predict
from mini_ht.demo.server import BODY, DemoServer, Handler
from mini_ht.demo.tasks import KEPT, Tasks

WAY = np.linspace(0, 1, 30)[:, None]
TURN = 2 * np.pi * WAY


def line(start, end):
    return np.array(start) + (np.array(end) - np.array(start)) * WAY


CIRCLE = [0.5 + 0.3 * np.concatenate([np.cos(TURN), np.sin(TURN)], 1)]
BAR = [line((0.5, 0.2), (0.5, 0.8))]
SYMBOLS = {
    "circle": CIRCLE,
    "bar": BAR,
    "cross": [line((0.2, 0.2), (0.8, 0.8)), line((0.8, 0.2), (0.2, 0.8))],
    "plus": [*BAR, line((0.2, 0.5), (0.8, 0.5))],
    "L": [line((0.3, 0.2), (0.3, 0.8)), line((0.3, 0.8), (0.7, 0.8))],
    "V": [line((0.2, 0.2), (0.5, 0.8)), line((0.5, 0.8), (0.8, 0.2))],
    "T": [*BAR, line((0.2, 0.2), (0.8, 0.2))],
    "U": [0.5 + 0.3 * np.concatenate([np.cos(TURN / 2), np.sin(TURN / 2)], 1)],
}


def plain(strokes):
    """As in a message."""
    return [stroke.tolist() for stroke in strokes]


def by_hand(strokes, rng):
    """The same symbol, turned and stretched a little, by an unsteady hand."""
    angle = rng.normal(0, 0.1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * np.exp(rng.normal(0, 0.12, 2))
    return [((x - 0.5) @ turn.T + 0.5 + rng.normal(0, 0.006, x.shape)).clip(0, 1) for x in strokes]


pad_points = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(list)
drawings = st.lists(st.lists(pad_points, min_size=1, max_size=6), min_size=1, max_size=3)
adapt_messages = st.lists(st.lists(drawings, min_size=1, max_size=3), min_size=2, max_size=3).map(
    lambda classes: {"classes": classes}
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(["classes", "id", "strokes"]), inner),
    max_leaves=25,
)


@st.composite
def spoiled(draw):
    """A message of the right form in which one part is something else."""
    message = draw(adapt_messages | drawings.map(lambda strokes: {"id": "00", "strokes": strokes}))
    part, key = message, draw(st.sampled_from(sorted(message)))
    while isinstance(part[key], list) and part[key] and draw(st.booleans()):
        part = part[key]
        key = draw(st.integers(0, len(part) - 1))
    part[key] = draw(anything)
    return message


# Drawings


@given(drawings, st.integers(8, 40))
def test_ink(strokes, size):
    """Ink has the right shape and dtype, lies in [0, 1], in the middle, and no longer than 18 of 28."""
    ink = strokes_to_ink([np.array(stroke) for stroke in strokes], size)
    assert ink.shape == (size, size, 1) and ink.dtype == np.float32 and ink.min() == 0 and 0 < ink.max() <= 1
    for axis in (0, 1):
        where = np.flatnonzero(ink[..., 0].any(axis))
        assert abs(where[0] + where[-1] - (size - 1)) <= 2 and np.ptp(where) + 1 <= size * 18 / 28 + 2


@given(st.sampled_from(sorted(SYMBOLS)), st.floats(0.3, 1), st.floats(0, 0.5), st.permutations(range(2)))
def test_ink_does_not_depend_on_the_pad(name, zoom, shift, order):
    """Place and size on the pad, the order of strokes and their direction do not matter."""
    strokes = SYMBOLS[name]
    ink = strokes_to_ink(strokes, 28)
    moved = strokes_to_ink([zoom * stroke[::-1] + shift for stroke in strokes], 28)
    assert np.abs(moved - ink).max() < 0.35 and np.abs(moved - ink).mean() < 0.01
    turned = [strokes[i] for i in order if i < len(strokes)]
    assert np.array_equal(strokes_to_ink(turned, 28), ink)


def test_ink_of_known_drawings():
    """A bar is 18 pixels long and about 1.4 wide; a tap is a dot of that width, and stays small if the pen slips."""
    bar = strokes_to_ink(BAR, 28)[..., 0]
    rows = np.flatnonzero(bar.max(1) > 0.3)
    assert rows[0] == 5 and rows[-1] == 22 and bar[14].sum() == pytest.approx(1.4, abs=0.15)
    assert strokes_to_ink([np.array([[0.9, 0.1]])], 28).sum() == pytest.approx(np.pi * 0.7**2, abs=0.5)
    assert strokes_to_ink([np.array([[0.9, 0.1], [0.91, 0.1]])], 28).sum() < 6


# Messages


@given(adapt_messages)
def test_messages_come_through(message):
    """A right message gives back its numbers."""
    classes = read_adapt(json.dumps(message).encode(), CLASSES)
    assert [[plain(drawing) for drawing in some] for some in classes] == message["classes"]
    strokes = message["classes"][0][0]
    name, drawing = read_predict(json.dumps({"id": "x", "strokes": strokes}).encode())
    assert name == "x" and plain(drawing) == strokes


DOT = [[[0.5, 0.5]]]
BAD_ADAPT = {
    b"": "JSON", b"{": "JSON", b"\xff": "JSON", b"[" * 100_000: "JSON", b'{"classes": [[[[[NaN, 0]]]], 1]}': "JSON",
    b"[]": "classes", b"null": "classes", b"{}": "classes", b'{"classes": [], "more": 1}': "nothing else",
    b'{"classes": 5}': "2 to 5 entries, something else", b'{"classes": []}': "2 to 5 entries, 0 came",
    json.dumps({"classes": [[DOT]]}).encode(): "2 to 5 entries, 1 came",
    json.dumps({"classes": [[DOT]] * (CLASSES + 1)}).encode(): "6 came",
    json.dumps({"classes": [[DOT], []]}).encode(): "classes[1]: wanted a list with 1 to 5",
    json.dumps({"classes": [[DOT], [DOT] * (DRAWINGS + 1)]}).encode(): "classes[1]: wanted a list with 1 to 5",
    json.dumps({"classes": [[DOT], [[]]]}).encode(): "classes[1][0]: wanted a list with 1 to 60",
    json.dumps({"classes": [[DOT], [DOT * (STROKES + 1)]]}).encode(): "61 came",
    json.dumps({"classes": [[DOT], [[[]]]]}).encode(): "classes[1][0][0]: wanted a list with 1 to 600",
    json.dumps({"classes": [[DOT], [[[[0, 0]] * (POINTS + 1)]]]}).encode(): "601 came",
    json.dumps({"classes": [[DOT], [[[[0, 0]] * POINTS, [[0, 0]]]]]}).encode(): "601 points came",
}  # fmt: skip


@pytest.mark.parametrize("body", BAD_ADAPT, ids=lambda body: str(body[:40]))
def test_bad_messages(body):
    """Every wrong message is refused in one sentence that names the place."""
    with pytest.raises(InputError) as caught:
        read_adapt(body, CLASSES)
    assert BAD_ADAPT[body] in str(caught.value)


POINTS_NOT_TAKEN = [
    "0.5",
    "[0.5]",
    "[0,0,0]",
    "[0,2]",
    "[-1,0]",
    "[true,0]",
    '["0",0]',
    "[1e999,0]",
    f"[{'9' * 5000},0]",
]


@pytest.mark.parametrize("point", POINTS_NOT_TAKEN, ids=lambda point: point[:9])
def test_bad_points(point):
    """A point has two numbers from 0 to 1."""
    with pytest.raises(InputError, match=r"strokes\[0\]\[0\]: wanted|not valid JSON"):
        read_predict(f'{{"id": "x", "strokes": [[{point}]]}}'.encode())


@pytest.mark.parametrize("name", ["7", "null", '""', f'"{65 * "x"}"'])
def test_bad_names(name):
    """An identifier is text of 1 to 64 characters."""
    with pytest.raises(InputError, match="id: wanted"):
        read_predict(f'{{"id": {name}, "strokes": [[[0, 1]]]}}'.encode())


# Tasks


@pytest.fixture(scope="module")
def tasks():
    return Tasks(*load_pretrained())


def test_pairs_of_symbols_are_told_apart(tasks):
    """One drawing a class is enough for two simple symbols, though norm statistics of two drawings say little."""
    rng = np.random.default_rng(0)
    right = []
    for pair in combinations(SYMBOLS, 2):
        name = tasks.adapt([[by_hand(SYMBOLS[symbol], rng)] for symbol in pair])["id"]
        for label, symbol in enumerate(pair):
            answers = [tasks.predict(name, by_hand(SYMBOLS[symbol], rng)) for _ in range(2)]
            right += [np.argmax(answer["probabilities"]) == label for answer in answers]
    assert len(right) == 112 and np.mean(right) > 0.97  # with statistics of the drawings alone: 0.92


@settings(max_examples=10)
@given(adapt_messages, drawings, st.randoms(use_true_random=False))
def test_probabilities(tasks, message, query, random):
    """They are one for each class and sum to 1; the order of a class's drawings and of strokes does not matter."""
    classes = read_adapt(json.dumps(message).encode(), CLASSES)
    strokes = [np.array(stroke) for stroke in query]
    shuffled = [[random.sample(drawing, len(drawing)) for drawing in random.sample(s, len(s))] for s in classes]
    first, second = (tasks.predict(tasks.adapt(some)["id"], strokes)["probabilities"] for some in (classes, shuffled))
    assert len(first) == len(classes) and sum(first) == pytest.approx(1) and min(first) >= 0
    assert np.allclose(first, second, atol=0.02)  # float32 through four norms


def test_few_are_kept(tasks):
    """The newest KEPT networks answer, older ones are refused with 404; what is used stays."""
    names = [tasks.adapt([[CIRCLE], [BAR]])["id"] for _ in range(KEPT)]
    tasks.predict(names[0], BAR)
    names.append(tasks.adapt([[CIRCLE], [BAR]])["id"])
    with pytest.raises(Refused, match="not kept") as caught:
        tasks.predict(names[1], BAR)
    assert caught.value.status == 404
    for name in (names[0], *names[2:]):
        assert np.argmax(tasks.predict(name, BAR)["probabilities"]) == 1


def test_other_generators():
    """The number of classes follows the generator; kernels and sizes, too. Photographs' generators are refused."""
    config = Config(way=3, channels=4, blocks=2, image_size=16, encoding=8, layers=1, shared_features=4)
    small = Tasks(draw_parameters(config, seed=0), config)
    reply = small.adapt([[CIRCLE], [BAR]])
    assert small.most_classes == 3 and np.shape(reply["kernels"]) == (4, 3, 3)
    assert sum(small.predict(reply["id"], BAR)["probabilities"]) == pytest.approx(1)
    colours = Config(way=3, channels=4, blocks=2, image_size=16, image_channels=3, encoding=8, layers=1)
    with pytest.raises(InputError, match="3 channels"):
        Tasks(draw_parameters(colours, seed=0), colours)


# The server


@pytest.fixture(scope="module")
def server(tasks):
    with DemoServer(tasks, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def ask(server):
    """ask(method, path, body, **headers) -> status, headers, body; a header given as None is left out."""

    def ask(method, path, body=None, **more):
        port = server.server_address[1]
        headers = {"Host": f"127.0.0.1:{port}"}
        if body is not None:
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        headers |= {name.replace("_", "-"): value for name, value in more.items()}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                for one in value if isinstance(value, list) else [value]:
                    if one is not None:
                        connection.putheader(name, one)
            connection.endheaders(body)
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()
        finally:
            connection.close()

    return ask


ADAPT = json.dumps({"classes": [[plain(CIRCLE)], [plain(BAR)]]}).encode()


def refused(answer, status, words=""):
    """This status, and one JSON sentence with these words."""
    assert answer[0] == status, answer
    sentence = json.loads(answer[2])["error"]
    assert words in sentence and "Traceback" not in sentence and "\n" not in sentence


def test_adapt_and_predict(ask):
    """Kernels, time and identifier come back; the classifier knows a bar from a circle."""
    status, headers, body = ask("POST", "/adapt", ADAPT)
    reply = json.loads(body)
    assert status == 200 and headers["Content-Type"] == "application/json" and headers["X-Content-Type-Options"]
    assert (
        np.shape(reply["kernels"]) == (8, 3, 3) and np.shape(reply["weights"]) == (2, 9) and reply["milliseconds"] > 0
    )
    for strokes, label in ((CIRCLE, 0), (BAR, 1)):
        status, _, body = ask("POST", "/predict", json.dumps({"id": reply["id"], "strokes": plain(strokes)}).encode())
        answer = json.loads(body)
        assert status == 200 and answer["milliseconds"] > 0
        assert sum(answer["probabilities"]) == pytest.approx(1) and answer["probabilities"][label] > 0.9


def test_the_page(ask, server):
    """The page is one file, loads nothing from elsewhere, and may not, by its policy."""
    for host in ("127.0.0.1", "localhost"):
        status, headers, body = ask("GET", "/", Host=f"{host}:{server.server_address[1]}")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    page, policy = body.decode(), headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    for outside in ("http:", "https:", "src=", "@import", "url(", "@CLASSES@"):
        assert outside not in page, outside


def test_the_server_is_local(server):
    """It listens at 127.0.0.1 and nowhere else."""
    assert server.socket.getsockname()[0] == "127.0.0.1"


PATHS = ["/page.html", "/../page.html", "/..%2f..%2fetc/passwd", "//etc/passwd", "/./", "/?x", "/adapt/", "http://x/"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_paths(ask, path, method):
    """There are no files to be had, whatever the path."""
    refused(ask(method, path, ADAPT if method == "POST" else None), 404, "nothing at this address")


@pytest.mark.parametrize("method, path", [("GET", "/adapt"), ("GET", "/predict"), ("POST", "/"), ("PUT", "/adapt")])
def test_other_methods(ask, method, path):
    """Each address has one method."""
    refused(ask(method, path, ADAPT), 405)
    status, _, body = ask("HEAD", "/")
    assert (status, body) == (405, b"") and ask("OPTIONS", "/adapt")[0] == 405


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "localhost:1", "", None, ["127.0.0.1:{}", "evil"]])
@pytest.mark.parametrize("method, path", [("GET", "/"), ("POST", "/adapt")])
def test_other_hosts(ask, server, host, method, path):
    """A name that somebody made point here (DNS rebinding) is refused, and so is no name, or two."""
    if isinstance(host, list):
        host = [one.format(server.server_address[1]) for one in host]
    refused(ask(method, path, ADAPT if method == "POST" else None, Host=host), 403, "its own address only")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1"])
def test_other_origins(ask, server, origin):
    """Other pages may not ask; the page itself may, and so may programs."""
    refused(ask("POST", "/adapt", ADAPT, Origin=origin), 403, "another page")
    refused(ask("POST", "/adapt", ADAPT, Sec_Fetch_Site="cross-site"), 403, "another page")
    own = server.url.rstrip("/")
    assert ask("POST", "/adapt", ADAPT, Origin=own, Sec_Fetch_Site="same-origin")[0] == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_other_content_types(ask, kind):
    """Forms and plain text, which any page may send anywhere, are refused."""
    refused(ask("POST", "/adapt", ADAPT, Content_Type=kind), 415, "application/json")
    assert ask("POST", "/adapt", ADAPT, Content_Type="application/json; charset=utf-8")[0] == 200


@pytest.mark.parametrize(
    "status, headers",
    [
        (411, {"Content_Length": None}),
        (411, {"Content_Length": "-1"}),
        (411, {"Content_Length": "\u00b2"}),
        (411, {"Content_Length": ["5", "6"]}),
        (411, {"Transfer_Encoding": "chunked"}),
        (413, {"Content_Length": str(BODY + 1)}),
        (413, {"Content_Length": "9" * 18}),
    ],
)
def test_lengths(ask, status, headers):
    """A message without a length, or too long, is refused by its headers: nothing of the body was sent here."""
    answer = ask("POST", "/adapt", None, **{"Content_Type": "application/json"} | headers)
    refused(answer, status)
    assert answer[1]["Connection"] == "close"


def test_unknown_classifier(ask):
    """An identifier that nobody was given is answered with 404."""
    refused(ask("POST", "/predict", json.dumps({"id": "x", "strokes": DOT}).encode()), 404, "not kept")


@settings(max_examples=30)
@given(anything | spoiled(), st.sampled_from(["/adapt", "/predict"]))
def test_any_json(ask, message, path):
    """Whatever JSON comes, the answer is a result or a refusal in one sentence."""
    answer = ask("POST", path, json.dumps(message).encode())
    if answer[0] != 200:
        assert answer[0] in (400, 404)
        refused(answer, answer[0])


def talk(server, request, wait=10.0):
    """Sends bytes, and nothing after them; all bytes that come back."""
    with socket.create_connection(server.server_address, timeout=wait) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        reply = b""
        try:
            while part := connection.recv(65536):
                reply += part
        except ConnectionResetError:  # closed before it had read everything
            pass
        return reply


@settings(max_examples=60)
@given(
    st.sampled_from([b"", b"GET ", b"POST /adapt HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n", b"POST / HTTP/9.9\r\n"]),
    st.binary(max_size=60) | st.text("GETPOS /:\r\nHTP1.%", max_size=60).map(str.encode),
    st.sampled_from([b"", b"\r\n\r\n"]),
)
def test_any_bytes(server, start, middle, end):
    """Whatever bytes come, the connection ends, without a page and without a status of 500 or more."""
    reply = talk(server, start + middle + end)
    assert b"Traceback" not in reply and not reply.startswith(b"HTTP/1.1 5") and b"HTTP/1.1 200" not in reply


@pytest.mark.parametrize("line", ["GET /", "GET / HTTP/0.9", "GET / HTTP/1.0"])
def test_old_clients(server, line):
    """A client of before HTTP/1.1 gets a status, all headers and a connection that ends, as any other."""
    reply = talk(server, f"{line}\r\nHost: {server.url[7:-1]}\r\n\r\n".encode())
    head, _, page = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and b"Content-Security-Policy: default-src 'none'" in head
    assert b"Connection: close" in head and page == server.page


def test_half_a_message(server, monkeypatch):
    """A message cut short is refused; one that never ends does not keep its thread."""
    headers = (f"Host: {server.url[7:-1]}", "Content-Type: application/json", "Content-Length: 99")
    head = "\r\n".join(("POST /adapt HTTP/1.1", *headers, "", "{")).encode()
    assert talk(server, head).startswith(b"HTTP/1.1 400 ")
    assert 0 < Handler.timeout <= 10
    monkeypatch.setattr(Handler, "timeout", 0.2)
    with socket.create_connection(server.server_address, timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(100) == b""


# The command


def test_options():
    """The options and their defaults, as the command line reads them."""
    assert tyro.cli(Demo, args=[]) == Demo(8000, "omniglot", True)
    assert tyro.cli(Demo, args=["--port", "0", "--checkpoint", "runs/x", "--no-open"]) == Demo(0, "runs/x", False)


def test_ports(server):
    """A port in use or out of range is refused with advice."""
    with pytest.raises(InputError, match=r"cannot use port \d+ .*stop the program .*--port"):
        demo(Demo(port=server.server_address[1], open=False))
    for port in (-1, 65536):
        with pytest.raises(InputError, match=f"port is {port}; choose"):
            demo(Demo(port=port, open=False))


def test_checkpoints(tmp_path):
    """A checkpoint that is missing, cut short or for photographs is refused before anything is served."""
    colours = Config(way=3, channels=4, blocks=2, image_size=16, image_channels=3, encoding=8, layers=1)
    file = save(tmp_path / "colours.safetensors", draw_parameters(colours, seed=0), colours)
    with pytest.raises(InputError, match="3 channels"):
        demo(Demo(0, str(file), False))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut short"):
        demo(Demo(0, str(file), False))
    with pytest.raises(InputError, match="no checkpoint"):
        demo(Demo(0, str(tmp_path / "nothing"), False))


def test_ctrl_c_ends_it():
    """The command says where the page is, and Ctrl-C ends it without complaint."""
    # A background job of a shell has Ctrl-C ignored, and so would what it starts.
    script = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from mini_ht.cli_demo import Demo, demo\ndemo(Demo(port=0, open=False))"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().startswith("mini-ht demo: http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(20) == 0 and process.stderr.read() == ""
        finally:
            process.kill()
