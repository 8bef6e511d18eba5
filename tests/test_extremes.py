"""Images without any contrast, or with all of it, never give NaN: variances of zero are handled everywhere."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, generic_parameters, seeds
from tolerances import assert_close, contents

from mini_ht import Config, draw_parameters, generate, to_torch
from mini_ht.errors import InputError
from mini_ht.ink import to_ink

pytestmark = pytest.mark.device

SMALL = Config(way=2, image_size=8, channels=4, blocks=2, encoding=8, layers=1, shared_features=4, local_features=4)


def image(kind: str, size: int, channels: int, number: int) -> np.ndarray:
    """An extreme image [size, size, channels] float32; `number` tells those of a set apart where they differ."""
    black = np.zeros((size, size, channels), np.float32)
    if kind == "single pixel":
        black[number % size, number // size % size] = 1
        return black
    if kind == "checkerboard":
        return black + np.float32((np.indices((size, size)).sum(0) + number)[..., None] % 2)
    if kind == "one bright of many":
        return black + (number == 0)
    return black + {"black": 0.0, "white": 1.0, "grey": 0.5, "faint": 1e-30, "not scaled": 255.0}[kind]


KINDS = (
    "black", "white", "grey", "faint", "not scaled", "single pixel", "checkerboard", "one bright of many",
)  # fmt: skip


def sets(kind: str, config: Config, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A support set [n, H, W, C] of two classes and its labels [n]."""
    pictures = [image(kind, config.image_size, config.image_channels, number) for number in range(count)]
    return np.stack(pictures), np.arange(count) % 2


@given(configs(), seeds, st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(1, 4), st.booleans())
@settings(deadline=None)
def test_weights_and_logits_are_finite(config, seed, kind, asked, count, masked):
    """For any generator, NumPy and torch, both norms, with and without padding: finite, and both libraries agree."""
    parameters = generic_parameters(config, seed, np.float32)
    support, labels = sets(kind, config, count)
    query = np.stack([image(asked, config.image_size, config.image_channels, number) for number in range(3)])
    mask = np.arange(count) < max(1, count - 1) if masked else None
    arrays = [parameters, support, labels, mask, query]
    tensors = [None if x is None else torch.from_numpy(x) for x in arrays[1:]]
    for norm in ("batch", "support"):
        choice = dataclasses.replace(config, norm=norm)
        cnn = generate(parameters, choice, support, labels, mask, check=False)
        logits = cnn(query)
        for name, array in contents(cnn).items():
            assert np.isfinite(array).all(), (name, norm)
        absent = ~np.isin(np.arange(config.way), labels if mask is None else labels[mask])
        assert np.isfinite(logits[:, ~absent]).all() and (logits[:, absent] == -np.inf).all()
        with torch.no_grad():
            there = generate(to_torch(parameters), choice, *tensors[:3], check=False)(tensors[3]).numpy()
        assert np.isfinite(there[:, ~absent]).all() and (there[:, absent] == -np.inf).all()


@pytest.mark.parametrize("norm", ["batch", "support"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_implementation_agrees(kind, norm, monkeypatch):
    """NumPy, torch and Triton give the same finite logits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # or a GPU rounds torch's and our products
    config = dataclasses.replace(SMALL, norm=norm)
    parameters = draw_parameters(config)
    support, labels = sets(kind, config, 4)
    wanted = generate(parameters, config, support, labels, impl="reference", check=False)(support)
    assert np.isfinite(wanted).all()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_torch = to_torch(parameters, device)
    pictures, numbers = torch.from_numpy(support).to(device), torch.from_numpy(labels).to(device)
    for impl in ("torch", "triton"):
        pytest.importorskip(impl)
        logits = generate(on_torch, config, pictures, numbers, impl=impl, check=False)(pictures)
        assert_close(logits, wanted, "float32", impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite(kind, dtype):
    """Training goes on over such a set: gradients of the loss are finite, in both precisions."""
    parameters = to_torch(draw_parameters(SMALL))
    support, labels = sets(kind, SMALL, 4)
    pictures, numbers = torch.from_numpy(support).to(dtype), torch.from_numpy(labels)
    logits = generate(parameters, SMALL, pictures, numbers, check=False)(pictures)
    loss = torch.nn.functional.cross_entropy(logits.float(), numbers)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    assert loss.isfinite() and all(part is None or part.isfinite().all() for part in gradients)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 2), (28, 28)])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_paper_without_ink_is_said_to_be_so(shape, value):
    with pytest.raises(InputError, match="no ink"):
        to_ink(np.full(shape, value, np.float32))


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 1599), st.booleans())
@settings(deadline=None)
def test_a_single_pixel_is_ink(height, width, at, light):
    """One dark pixel on white, or light on black, becomes a finite image with ink, or is said to be none."""
    pixels = np.ones((height, width), np.float32)
    pixels.flat[at % pixels.size] = 0
    try:
        ink = to_ink(1 - pixels if light else pixels)
    except InputError as error:
        assert "no ink" in str(error)
        return
    assert np.isfinite(ink).all() and 0 <= ink.min() and ink.max() <= 1 and ink.sum() > 0
