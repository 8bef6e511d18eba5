"""The slow lane: `python -m tests.fuzz TARGET... --minutes 10`, guided by coverage where atheris is installed.

Inputs that break the rule are written to `--out`, by target and digest; the exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path


class Tally:
    """Counts what became of a target's inputs, and keeps those that broke the rule."""

    def __init__(self, name: str, out: Path, seconds: float) -> None:
        from .rule import Broken, check
        from .targets import HOME, TARGETS

        self.broken, self.check, self.scratch = Broken, check, HOME
        self.name, self.out, (self.target, seeds) = name, out, TARGETS[name]
        self.seeds = [*seeds(), *(file.read_bytes() for file in corpus(name))]
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.start, self.cpu, self.end = time.monotonic(), time.process_time(), time.monotonic() + seconds

    def run(self, data: bytes) -> None:
        """One input."""
        try:
            self.counts[self.check(self.target, data)] += 1
        except self.broken as error:
            self.counts["broken"] += 1
            kind = f"{type(error.__cause__).__name__} {str(error)[:60]}"
            self.kinds[kind] += 1
            if self.kinds[kind] <= 3 and len(self.kinds) < 50:
                self.out.mkdir(parents=True, exist_ok=True)
                (self.out / f"{self.name}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
                print(f"{self.name}: BROKEN {error}", flush=True)
        if time.monotonic() > self.end:
            self.finish()

    def finish(self) -> None:
        """Print what was found and leave: libFuzzer would not come back."""
        total, cpu = sum(self.counts.values()), time.process_time() - self.cpu
        seconds = time.monotonic() - self.start
        found = ", ".join(f"{count:,} {what}" for what, count in sorted(self.counts.items()))
        print(f"{self.name}: {total:,} inputs ({found}) in {seconds:.0f} s, {total / cpu:,.0f} a second of CPU time")
        sys.stdout.flush()
        shutil.rmtree(self.scratch, ignore_errors=True)
        os._exit(1 if self.counts["broken"] else 0)


def corpus(name: str) -> list[Path]:
    """The inputs of a target that once broke the rule."""
    return sorted(Path(__file__).with_name("corpus").glob(f"{name}--*"))


def fuzz(name: str, out: Path, seconds: float, seed: int, guided: bool) -> None:
    """One target, in this process, which then ends."""
    warnings.simplefilter("ignore")
    if guided:
        import atheris

        with atheris.instrument_imports(include=["mini_ht", "PIL", "zipfile", "json", "http"]):
            tally = Tally(name, out, seconds)
        folder = out / f"seeds-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(tally.seeds):
            (folder / str(number)).write_bytes(data)
        longest = max(65536, *(2 * len(data) for data in tally.seeds))
        options = [f"-max_len={longest}", f"-seed={seed + 1}", "-timeout=120", "-rss_limit_mb=8192", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, str(folder)], tally.run)
        atheris.Fuzz()
    from .edits import edited, random_edits

    tally, rng = Tally(name, out, seconds), random.Random(seed)
    for data in tally.seeds:
        tally.run(data)
    while True:
        tally.run(edited(rng.choice(tally.seeds), random_edits(rng), rng.choice(tally.seeds)))


def main() -> int:
    """Each target in a process of its own, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="all of them if none is named")
    parser.add_argument("--minutes", type=float, default=10, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--plain", action="store_true", help="do not use atheris")
    options = parser.parse_args()
    guided = not options.plain and importlib.util.find_spec("atheris") is not None
    if os.environ.get("MINI_HT_FUZZ") and len(options.targets) == 1:
        fuzz(options.targets[0], options.out, 60 * options.minutes, options.seed, guided)
    from .targets import TARGETS

    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(TARGETS)}")
    print("guided by coverage" if guided else "by random edits (atheris is not installed)", flush=True)
    failed = 0
    for name in options.targets or TARGETS:
        command = [sys.executable, "-m", "tests.fuzz", name, *sys.argv[1:][len(options.targets) :]]
        with contextlib.suppress(KeyboardInterrupt):
            failed |= subprocess.run(command, env=os.environ | {"MINI_HT_FUZZ": "1"}, check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
