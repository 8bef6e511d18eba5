"""Looks for tiles that are faster on this GPU than the table's: `python -m mini_ht.kernels.tune --out tiles.json`.

Writes the list that MINI_HT_TILES names; one job at a time, each candidate checked before it is timed.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch import Tensor

from mini_ht.kernels import alternatives
from mini_ht.kernels.benchmark import KINDS, cuda_seconds, set_products, steps
from mini_ht.kernels.problems import Problem, problems
from mini_ht.kernels.tiles import LIST, Tile, candidates, choose, job_key, listed, read_channels
from mini_ht.kernels.triton_conv import default_precision
from mini_ht.kernels.triton_launch import hopper

GAIN = 0.98  # a candidate must take less than this share of the time of the best so far
# Relative to the table's tiles: the order of sums may differ, the products may not.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def gradients(problem: Problem, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Output and gradients of the net, to tell a wrong tile from a right one."""
    x, *parameters = problem.draw(device, dtype)
    y = alternatives.fused(x, *parameters)
    leaves = [leaf for parts in parameters for leaf in parts]
    # Not all ones: the norm would make every other gradient zero.
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


def agrees(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> bool:
    """Whether every tensor is the wanted one, by the norm of the difference."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)]
    return all(float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-6 for a, b in pairs)


def refine(
    problem: Problem, dtype: torch.dtype, device: str, seconds: Callable[[], float], tiles: dict[str, Tile]
) -> dict[str, Tile]:
    """The list with those jobs of a net added for which a candidate is faster.

    seconds: how long forward and backward take, with the list in force.
    """
    kind, precision = str(dtype).removeprefix("torch."), default_precision()
    wanted = gradients(problem, dtype, device)
    for number, (_, inputs, outputs) in enumerate(problem.blocks[:2]):  # the later blocks have the second one's shape
        inputs = inputs if number else read_channels(inputs)
        for job in ("forward", "weight", "input")[: 2 + number]:  # images want no gradient
            key = job_key(job, inputs, outputs, kind, precision)
            with in_force(tiles):
                best, start = seconds(), choose(job, inputs, outputs, kind, precision, hopper(torch.device(device)))
            for tile in candidates(start):
                trial = tiles | {key: tile}
                try:
                    with in_force(trial):
                        right = agrees(gradients(problem, dtype, device), wanted, TOLERANCE[dtype])
                        took = seconds() if right else float("inf")
                except Exception as error:  # too much shared memory, too many registers, ...
                    print(f"{key}: {tile} does not run: {str(error).splitlines()[0][:80]}")
                    continue
                if took < GAIN * best:
                    print(f"{key}: {1e6 * best:.1f} -> {1e6 * took:.1f} us with {tile}", flush=True)
                    best, tiles = took, trial
    return tiles


@contextmanager
def in_force(tiles: dict[str, Tile]) -> Iterator[None]:
    """Kernels take these tiles inside the block."""
    with TemporaryDirectory() as folder:  # a new name each time, as lists are remembered by name
        file = Path(folder) / "tiles.json"
        file.write_text(as_json(tiles))
        with patch.dict(os.environ, {LIST: str(file)}):
            yield


def as_json(tiles: dict[str, Tile]) -> str:
    """The list as its file."""
    return json.dumps({key: dataclasses.asdict(tile) for key, tile in tiles.items()}, indent=1)


def main() -> None:
    """Search over the benchmark's nets and write the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiles.json"), help="the list to write or to go on with")
    parser.add_argument("--channels", type=int, nargs="+", default=[8, 16], help="widths of the nets to tune")
    parser.add_argument("--kind", choices=sorted(KINDS), default="bf16", help="values and products")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "tiles are tuned on a CUDA device, and torch sees none here\n")
    tiles = dict(listed(str(options.out))) if options.out.exists() else {}
    dtype = KINDS[options.kind][0]
    set_products(options.kind)
    for problem in problems(True):
        if problem.channels in options.channels:
            make = partial(steps, alternatives.fused, problem.draw("cuda", dtype))
            tiles = refine(problem, dtype, "cuda", partial(cuda_seconds, make, "both"), tiles)
            options.out.write_text(as_json(tiles))
    print(f"{len(tiles)} tiles in {options.out}; use them with {LIST}={options.out}")


if __name__ == "__main__":
    main()
