"""Commands that are killed while they run, and what must be true of the files that they leave."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mini_ht.files import PART

PATIENCE = 600.0  # seconds until a process counts as hanging, on a machine busy with other things
READ = (os.devnull, os.O_RDONLY)
WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def session(leader: int) -> dict[int, str]:
    """The processes of a session that have not ended, with their command lines."""
    found = {}
    for place in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state, _, _, its = (place / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its) == leader and state not in "ZX":
                found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ")
    return found


def wait_until(true: Callable[[], Any], seconds: float) -> bool:
    """Whether it became true within so many seconds."""
    end = time.monotonic() + seconds
    while not (found := bool(true())) and time.monotonic() < end:
        time.sleep(0.01)
    return found


class Slow(BaseHTTPRequestHandler):
    """Serves the files of a folder in small pieces."""

    folder: Path

    def do_GET(self) -> None:
        content = (self.folder / self.path.rpartition("/")[2]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(OSError):  # the one who asked was killed
            for start in range(0, len(content), 1 << 15):
                self.wfile.write(content[start : start + (1 << 15)])
                time.sleep(0.02)

    def log_message(self, *words: Any) -> None:
        """Keep quiet."""


@dataclass
class Running:
    """A command that was started: its process leads a session."""

    process: int
    answers: Any
    out: Path
    err: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self) -> int:
        """Its exit code, minus the signal if one ended it; what hangs is killed, and fails."""
        if not select.select([self.answers], [], [], PATIENCE)[0]:
            os.killpg(self.process, signal.SIGKILL)
            raise AssertionError(f"no end after {PATIENCE} s: {self.err.read_text()}")
        return int(self.answers.readline())

    def workers(self) -> list[int]:
        """Processes that it has started to share its work."""
        return [number for number, line in session(self.process).items() if "spawn_main" in line]

    def kill(self, whom: str) -> bool:
        """SIGKILL to the whole group, to the main process, or to a worker; False if that came too late."""
        victims = [-self.process if whom == "group" else self.process]
        if whom == "worker":
            wait_until(lambda: self.workers() or not session(self.process), PATIENCE)
            victims = self.workers()
        with suppress(ProcessLookupError):
            for victim in victims[:1]:
                os.kill(victim, signal.SIGKILL)
                return True
        return False

    def orphans_end(self) -> float:
        """Seconds until nothing is left of the session."""
        start = time.monotonic()
        assert wait_until(lambda: not session(self.process), PATIENCE), f"orphans: {session(self.process)}"
        return time.monotonic() - start


class World:
    """Runs commands in the small world of `faults_world`, one after the other."""

    def __init__(self, folder: Path, archives: Path, home: str, server: Any) -> None:
        self.folder, self.archives, self.home, self.server, self.count = folder, archives, home, server, 0

    def start(self, *words: Any, out: str = "", cache: Path | None = None, **limits: int) -> Running:
        """Start a command and wait until its work begins; out names a file for stdout, cache the cache folder."""
        self.count += 1
        ready, stdout, stderr = (self.folder / f"{self.count}.{name}" for name in ("ready", "out", "err"))
        order = {
            "words": [str(word) for word in words],
            "ready": str(ready),
            "archives": str(self.archives),
            "home": self.home,
            "limits": limits,
            "environment": {"MINI_HT_CACHE": str(cache or self.folder / "cache")},
            "streams": [READ, (out or str(stdout), WRITE), (str(stderr), WRITE)],
        }
        self.server.stdin.write(json.dumps(order).encode() + b"\n")
        running = Running(int(self.server.stdout.readline()), self.server.stdout, stdout, stderr)
        assert wait_until(ready.exists, PATIENCE), stderr.read_text()
        running.started = time.monotonic()
        return running

    def run(self, *words: Any, **options: Any) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command that nobody kills."""
        running = self.start(*words, **options)
        return running.wait(), running.out.read_text() if running.out.exists() else "", running.err.read_text()


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """A World whose files lie in `folder`, with a slow public home of its Omniglot."""
    from faults_world import write_archives

    archives = write_archives(folder / "archives")
    home = ThreadingHTTPServer(("127.0.0.1", 0), type("Home", (Slow,), {"folder": archives}))
    threading.Thread(target=home.serve_forever, daemon=True).start()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", "TQDM_DISABLE": "1"}
    environment.pop("PYTHONUNBUFFERED", None)  # with it, errors of stdout come early
    script, pipe = Path(__file__).with_name("faults_world.py"), subprocess.PIPE
    server = subprocess.Popen([sys.executable, script], bufsize=0, stdin=pipe, stdout=pipe, env=environment)
    try:
        yield World(folder, archives, f"http://127.0.0.1:{home.server_port}/", server)
    finally:
        assert server.stdin and server.stdout
        server.stdin.close()
        server.wait(PATIENCE)
        server.stdout.close()
        home.shutdown()
        home.server_close()


@dataclass
class Operation:
    """A command that can be repeated until it is done.

    words: from its folder, those of the next attempt. whole: raises unless every file in the folder is whole. finished:
    raises unless the folder equals that of a run that nobody killed.
    """

    words: Callable[[Path], list[Any]]
    whole: Callable[[Path], None]
    finished: Callable[[Path, Path], None]
    prepare: Callable[[Path], None] = lambda folder: None


@dataclass
class Tally:
    """Kills that were survived, ends without one, and the longest that orphans lived, in seconds."""

    kills: int = 0
    finished: int = 0
    orphans: float = 0.0


def survive(world: World, operation: Operation, whoms: list[str], seed: int, folder: Path, cache: bool) -> Tally:
    """Kill an operation at random moments, as often as `whoms` has entries; after each, see that all files are whole.

    The next attempt starts where the last was killed. When one ends by itself, and at the end, the folder must be that
    of a run that nobody killed.
    """
    rng, tally, waiting = random.Random(seed), Tally(), list(whoms)

    def attempt(place: Path) -> Running:
        return world.start(*operation.words(place), out=str(place / "stdout"), cache=place if cache else None)

    def begin(name: str) -> Path:
        (place := folder / name).mkdir(parents=True)
        operation.prepare(place)
        return place

    reference = begin("reference")
    running = attempt(reference)
    code = running.wait()
    assert code == 0, running.err.read_text()
    span, place = time.monotonic() - running.started, begin("0")
    while True:
        running = attempt(place)
        if waiting:
            time.sleep(rng.uniform(0, 0.8 * span))
            struck = running.kill(waiting[0])
        code = running.wait()
        if waiting and struck and code != 0:
            whom = waiting.pop(0)
            tally.orphans = max(tally.orphans, running.orphans_end())
            said = running.err.read_text()
            assert code == (2 if whom == "worker" else -signal.SIGKILL), said
            assert whom != "worker" or ("a worker process ended" in said and "Traceback" not in said), said
            tally.kills += 1
            operation.whole(place)
            for part in place.rglob("*".join(PART)):
                os.utime(part, (0, 0))  # what is so old belongs to nobody any more
            continue
        assert code == 0, running.err.read_text()
        operation.whole(place)
        operation.finished(place, reference)
        tally.finished += 1
        if not waiting:
            return tally
        place = begin(str(tally.finished))
