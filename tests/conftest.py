"""The test session: one thread, Triton's interpreter where there is no GPU, profiles, both array libraries."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


def has_gpu() -> bool:
    """Whether the CUDA driver sees a device; asked without torch, which must not be imported yet."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


# Read once, when numpy, torch and triton are imported. On small arrays more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)

# No deadline: the first example of a test may import or compile something.
settings.register_profile("dev", max_examples=15, deadline=None)
settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("nightly", max_examples=500, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

LONGEST = "compile_report", "distributed", "kill", "limits", "results", "training", "triton", "tune"
LONG = {f"test_{name}" for name in LONGEST}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take a minute or more of a core begin, so that at the end no core waits for another."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True, scope="module")
def no_gpu_unless_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """No GPU for files without the marker `device`: they hold laws of the CPU, or start programs that share a step."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("device"):
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for programs that are started
        yield


@dataclass(frozen=True)
class Library:
    """One of the two array libraries, with the way in and out; None, tuples, lists and dicts pass through."""

    name: str

    def to(self, x: Any) -> Any:
        """Copies of NumPy arrays as arrays of this library."""
        if isinstance(x, dict):
            return {key: self.to(value) for key, value in x.items()}
        if isinstance(x, tuple | list):
            return type(x)(self.to(part) for part in x)
        if not isinstance(x, np.ndarray):
            return x
        return x.copy() if self.name == "numpy" else torch.from_numpy(x.copy())

    def back(self, x: Any) -> Any:
        """NumPy arrays of this library's arrays, after making sure that they are of this library."""
        if isinstance(x, tuple | list):
            return type(x)(self.back(part) for part in x)
        assert isinstance(x, np.ndarray if self.name == "numpy" else torch.Tensor), type(x)
        return x if self.name == "numpy" else x.detach().numpy()


# Of the session, since Hypothesis runs many examples inside one call of a test.
@pytest.fixture(scope="session", params=["numpy", "torch"])
def library(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)
