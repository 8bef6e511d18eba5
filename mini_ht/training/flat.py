"""All parameters as one vector: one optimiser update, one gradient to pass between processes."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mini_ht.config import Config
from mini_ht.parameters import Table, parameter_table

KINDS = ("convs", "matrices", "vectors")


def kind(name: str, shape: tuple[int, ...]) -> str:
    """Parameters that learn alike: the CNN's own convs, other matrices (and higher), and vectors."""
    if len(shape) == 1:
        return "vectors"
    learned_conv = name.startswith("conv") and name.count(".") == 1 and len(shape) == 4
    return "convs" if learned_conv else "matrices"


class Layout:
    """Where each parameter of a config lies in the vector: kind by kind, and each kind's part."""

    def __init__(self, config: Config) -> None:
        self.lay_out(parameter_table(config), kind)

    def lay_out(self, table: Table, kind: Callable[[str, tuple[int, ...]], str]) -> None:
        """Give every parameter of the table its place."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.parts: dict[str, slice] = {}
        self.size = 0
        for which in KINDS:
            some = {name: shape for name, (shape, _) in table.items() if kind(name, shape) == which}
            start, self.size = self.size, self.size + sum(math.prod(shape) for shape in some.values())
            self.parts[which] = slice(start, self.size)
            self.shapes |= some
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]

    def join(self, parameters: dict[str, NDArray[np.floating]]) -> Tensor:
        """Parameters -> vector [size], a copy."""
        return torch.cat([torch.from_numpy(parameters[name]).reshape(-1) for name in self.shapes])

    def leaves(self, vector: Tensor) -> dict[str, Tensor]:
        """Vector [size] -> parameters that share its memory and record gradients, each its own."""
        return {name: view.detach().requires_grad_() for name, view in self.views(vector).items()}

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Vector [size] -> parameters that share its memory and pass gradients to it."""
        parts = vector.split(self.sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
