"""`python -m mini_ht` is the command line, and `torchrun -m mini_ht train` starts it once for each rank."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mini_ht import cli
from mini_ht.errors import InputError


def follow(options: cli.Train) -> None:
    """What `train` is to every rank but the first: computing, with no file, figure or word of its own."""
    from mini_ht.training.loop import train

    images = cli.open_images(options.config, options.data_dir)
    train(options.config, images, options.run_dir or Path("runs") / options.preset, workers=options.workers)


def complain_once(train: Callable[[cli.Train], None], options: cli.Train) -> None:
    """Train; of the ranks that meet an error, which may be the same one, the first to do so has it printed."""
    from mini_ht.training.distributed import another_failed

    try:
        train(options)
    except InputError:
        if another_failed():
            raise SystemExit(2) from None
        raise


def main() -> int:
    """Run the command line as this process's rank; returns the exit code."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["train"] and "TORCHELASTIC_RUN_ID" in os.environ:
        from mini_ht.training.distributed import join, restarted

        if restarted():  # what the last start has left is not to be cleared
            arguments = [argument for argument in arguments if argument != "--overwrite"]
        if not (first := os.environ["RANK"] == "0"):
            join()  # once the first has accepted the options and has its data, downloaded or converted
        cli.train = partial(complain_once, cli.train if first else follow)
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
