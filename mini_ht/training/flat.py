"""All parameters as one vector: one optimiser update, one gradient to pass between processes."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mini_ht.config import Config
from mini_ht.parameters import parameter_table


class Layout:
    """Where each parameter of a config lies in the vector: first the matrices (and higher), then the vectors."""

    def __init__(self, config: Config) -> None:
        table = sorted(parameter_table(config).items(), key=lambda item: len(item[1][0]) == 1)
        self.shapes = {name: shape for name, (shape, _) in table}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.size = sum(self.sizes)
        self.matrices = sum(math.prod(shape) for shape in self.shapes.values() if len(shape) > 1)

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
