"""NumPy: the convs as gathered neighbourhoods times a matrix."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def neighbourhoods(x: Floats, kernel: int, stride: int, padding: int) -> Floats:
    """Every k x k neighbourhood as a row (row, column, channel): x [B, H, W, C] -> [B, H', W', k * k * C]."""
    batch, height, width, channels = x.shape
    if padding:
        inner, height, width = x, height + 2 * padding, width + 2 * padding
        x = np.zeros((batch, height, width, channels), inner.dtype)  # np.pad takes several times as long
        x[:, padding:-padding, padding:-padding] = inner
    rows, columns = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    step_b, step_h, step_w, step_c = x.strides
    # A neighbourhood's row is k * C values that lie side by side, so a view with two inner axes shows them all.
    view = np.lib.stride_tricks.as_strided(
        x,
        shape=(batch, rows, columns, kernel, kernel * channels),
        strides=(step_b, step_h * stride, step_w * stride, step_h, step_c),
        writeable=False,
    )
    return view.reshape(batch, rows, columns, kernel * kernel * channels)


def conv2d(x: Floats, weight: Floats, bias: Floats, stride: int, padding: int) -> Floats:
    """x [B, H, W, Cin], weight [k, k, Cin, Cout], bias [Cout] -> [B, H', W', Cout]."""
    kernel, _, inputs, outputs = weight.shape
    rows = neighbourhoods(x, kernel, stride, padding)  # [B, H', W', k * k * Cin]
    return rows @ weight.reshape(kernel * kernel * inputs, outputs) + bias


def window_weight(weight: Floats) -> Floats:
    """The four convs of a 2x2 pooling window as one matrix: [E, 3, 3, Cin, Cout] -> [E, 16 * Cin, 4 * Cout].

    A window sees 4 x 4 input pixels; position (i, j) in it uses the 3 x 3 of them that start at (i, j).
    """
    episodes, _, _, inputs, outputs = weight.shape
    matrix = np.zeros((episodes, 4, 4, inputs, 2, 2, outputs), weight.dtype)
    for i in range(2):
        for j in range(2):
            matrix[:, i : i + 3, j : j + 3, :, i, j] = weight
    return matrix.reshape(episodes, 16 * inputs, 4 * outputs)


def window_outputs(x: Floats, weight: Floats) -> Floats:
    """The conv outputs that each pooling window compares, row by row in it.

    x [E, N, H, W, Cin], weight [E, 3, 3, Cin, Cout] -> [E, N, h, w, 4, Cout] with h = H // 2, w = W // 2.

    One matrix row is one pooling window, so the four lie side by side.
    """
    episodes, images, height, width, inputs = x.shape
    h, w, outputs = height // 2, width // 2, weight.shape[-1]
    flat = np.ascontiguousarray(x).reshape(episodes * images, height, width, inputs)  # [E * N, H, W, Cin]
    rows = neighbourhoods(flat, 4, stride=2, padding=1)  # [E * N, h, w, 16 * Cin]
    rows = rows.reshape(episodes, images * h * w, 16 * inputs)
    values = rows @ window_weight(weight)  # [E, N * h * w, 4 * Cout]
    return values.reshape(episodes, images, h, w, 4, outputs)


def conv_max_pool(x: Floats, weight: Floats) -> Floats:
    """conv 3x3 'same', then 2x2 max-pool (valid).

    x [E, N, H, W, Cin], weight [E, 3, 3, Cin, Cout] -> [E, N, h, w, Cout] with h = H // 2, w = W // 2.
    """
    four = window_outputs(x, weight)  # [E, N, h, w, 4, Cout]
    # Maxima of pairs of long rows are several times faster than a reduction over a short axis.
    pairs = np.maximum(four[..., :2, :], four[..., 2:, :])
    return np.maximum(pairs[..., 0, :], pairs[..., 1, :])


def blur_pool(x: Floats) -> Floats:
    """ReLU, the largest of each 2x2, then 1 2 1 along both axes, a quarter of it, at every second place.

    x [B, H, W, C] -> [B, H // 2, W // 2, C]; beyond the edge there are zeros.
    """
    largest = np.maximum(x[:, :-1], x[:, 1:])  # [B, H - 1, W, C]
    p = np.zeros((len(x), x.shape[1] + 1, x.shape[2] + 1, x.shape[3]), x.dtype)
    np.maximum(np.maximum(largest[:, :, :-1], largest[:, :, 1:]), 0, out=p[:, 1:-1, 1:-1])  # [B, H - 1, W - 1, C]
    rows = (p[:, :-2:2] + 2 * p[:, 1:-1:2] + p[:, 2::2]) / 4  # [B, H // 2, W + 1, C]
    return (rows[:, :, :-2:2] + 2 * rows[:, :, 1:-1:2] + rows[:, :, 2::2]) / 4  # [B, H // 2, W // 2, C]


def batch_norm(x: Floats, gamma: Floats, beta: Floats, eps: float) -> tuple[Floats, tuple[Floats, Floats]]:
    """Each channel of each episode to mean 0 and variance 1, then scaled and shifted.

    x [E, N, h, w, C], gamma and beta [C] -> (like x, (mean, variance), each [E, C]).
    """
    mean = x.mean((1, 2, 3), keepdims=True)  # [E, 1, 1, 1, C]
    centred = x - mean
    variance = (centred * centred).mean((1, 2, 3), keepdims=True)  # [E, 1, 1, 1, C]
    y = centred * (gamma * (variance + x.dtype.type(eps)) ** -0.5) + beta
    return y, (mean[:, 0, 0, 0], variance[:, 0, 0, 0])
