"""`mini-ht demo`: the page to try it."""

from __future__ import annotations

import threading
import webbrowser
from dataclasses import dataclass

from mini_ht.adaptation import open_generator
from mini_ht.demo.server import DemoServer
from mini_ht.demo.tasks import Tasks


@dataclass
class Demo:
    """Draw a few symbols in the browser and watch a classifier for them being generated and at work.

    The page is served to this computer only, and nothing leaves it. Ctrl-C ends it.
    """

    port: int = 8000
    """Where the page is served, at 127.0.0.1; 0 takes any free port."""
    checkpoint: str = "omniglot"
    """A generator that comes with the package, a run folder or a model.safetensors."""
    open: bool = True
    """Open the page in the browser."""


def demo(options: Demo) -> None:
    """Serve the page until Ctrl-C. Raises InputError for a port or a checkpoint that cannot be had."""
    generator = open_generator(options.checkpoint)
    with DemoServer(Tasks(generator.parameters, generator.config), options.port) as server:
        try:
            print(f"mini-ht demo: {server.url} (Ctrl-C ends it)", flush=True)
            if options.open:  # a browser in the terminal would keep this thread
                threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
            server.serve_forever()
        except KeyboardInterrupt:
            print()


COMMANDS = {"demo": (Demo, demo)}
