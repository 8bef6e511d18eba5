"""What a baseline is and learns: options, parameters with their shapes and starts, and where they lie in a vector."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mini_ht.config import Config
from mini_ht.errors import InputError
from mini_ht.parameters import Table
from mini_ht.plan import KERNEL, plan
from mini_ht.training.flat import Layout

Name = Literal["prototypes", "maml", "maml++"]
NAMES: tuple[Name, ...] = get_args(Name)

# What differs from the presets, which are for HyperTransformers; chosen on validation characters, all classes turned.
RECIPES: dict[str, dict[str, Any]] = {
    "prototypes": {"learning_rate": 2e-2, "conv_rate": 1.0, "episodes_per_step": 8, "decay": 1.0, "turned": 1.0},
    "maml": {"learning_rate": 1e-2, "conv_rate": 1.0, "episodes_per_step": 8, "decay": 1.0, "turned": 1.0},
    "maml++": {"learning_rate": 1e-2, "conv_rate": 5.0, "episodes_per_step": 8, "decay": 1.0, "turned": 1.0},
}


@dataclass(frozen=True)
class Method:
    """Which baseline, and how its inner loop runs. Raises InputError for values that make no sense.

    Prototypes have no inner loop; MAML is MAML++ without what only the latter learns or anneals.
    """

    name: Name = "maml++"
    steps: int = 5  # Gradient steps of the inner loop
    inner_rate: float = 0.4  # Learning rate of the inner loop; MAML++ learns factors to it, one a layer and step
    multi_step: float = 0.1  # MAML++: share of the training in which queries are classified after every step
    first_order: float = 0.5  # MAML++: share of the training, at its start, without second derivatives

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise InputError(f"the method is {self.name!r}; choose one of {', '.join(NAMES)}")
        if self.steps < 1 or not 0 <= self.inner_rate < math.inf:
            raise InputError(f"steps {self.steps} and inner_rate {self.inner_rate} came; wanted at least 1 and 0")
        if not (0 <= self.multi_step <= 1 and 0 <= self.first_order <= 1):
            raise InputError("multi_step and first_order are shares of the training: each must lie in [0, 1]")

    @property
    def plus(self) -> bool:
        """Whether it is MAML++."""
        return self.name == "maml++"

    def to_json(self) -> str:
        """All fields as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Method:
        """The Method that `to_json` wrote; InputError for anything else."""
        try:
            return Method(**json.loads(text))
        except (json.JSONDecodeError, TypeError) as error:
            raise InputError(f"the method {text!r} is of another version of mini_ht ({error}); train again") from error


def table(config: Config, method: Method) -> Table:
    """Every parameter's name, shape and start: a standard deviation, or "zeros" or "ones".

    conv1.weight [3, 3, Cin, Cout], conv1.gamma and conv1.beta [steps, or but for MAML++ 1, Cout], and so on; of MAML
    also logits.weight [way, F + 1], the bias last, and of MAML++ conv1.rate ... logits.rate [steps], factors to
    inner_rate.
    """
    found: Table = {}
    *convs, logits = plan(config)
    sets = method.steps if method.plus else 1
    for layer in convs:
        shape = (KERNEL, KERNEL, layer.inputs, layer.outputs)
        found[f"{layer.name}.weight"] = (shape, math.sqrt(2 / (KERNEL * KERNEL * layer.inputs)))
        found[f"{layer.name}.gamma"] = ((sets, layer.outputs), "ones")
        found[f"{layer.name}.beta"] = ((sets, layer.outputs), "zeros")
    if method.name != "prototypes":
        found["logits.weight"] = ((config.way, logits.inputs + 1), "zeros")
    if method.plus:
        found |= {f"{layer.name}.rate": ((method.steps,), "ones") for layer in plan(config)}
    return found


def draw(config: Config, method: Method) -> dict[str, NDArray[np.float32]]:
    """Fresh parameters, bit for bit the same for the same config and method."""
    rng = np.random.default_rng(config.seed)
    starts = {"ones": np.ones, "zeros": np.zeros}
    return {
        name: (starts[start](shape) if isinstance(start, str) else start * rng.standard_normal(shape)).astype("f4")
        for name, (shape, start) in table(config, method).items()
    }


def kind(name: str, shape: tuple[int, ...]) -> str:
    """Parameters that learn alike; what a step of MAML++ has of its own are vectors, stacked."""
    if not name.endswith(".weight"):
        return "vectors"
    return "convs" if len(shape) == 4 else "matrices"


class BaselineLayout(Layout):
    """Where each parameter of a baseline lies in the vector: convs, logits weights, the rest; and each kind's part."""

    def __init__(self, config: Config, method: Method) -> None:
        self.lay_out(table(config, method), kind)
