"""The generated CNN: four conv blocks and a linear layer, with other weights for every episode."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from mini_ht.arrays import Array, as_floats, namespace
from mini_ht.checks import check_query
from mini_ht.errors import InputError
from mini_ht.kernels import conv_stack


@dataclass(frozen=True)
class ConvLayer:
    """The weights of one conv block, and what its norm saw of the support set."""

    weight: Array  # [E, 3, 3, Cin, Cout]
    bias: Array | None  # [E, Cout]
    gamma: Array  # [Cout]
    beta: Array  # [Cout]
    statistics: tuple[Array, Array]  # mean and variance of the support pass, each [E, Cout]
    affine: tuple[Array, Array] | None = None  # generated, behind the norm: y * (1 + [E, Cout]) + [E, Cout]

    def rescaled(self, x: Array) -> Array:
        """Normalised activations [E, N, h, w, Cout] with this task's own scale and offset, if they are generated."""
        if self.affine is None:
            return x
        scale, offset = (part[:, None, None, None] for part in self.affine)  # [E, 1, 1, 1, Cout]
        return as_floats(x * (1 + scale) + offset, x)


@dataclass(frozen=True)
class GeneratedCNN:
    """A classifier for the task of each episode; `generate` makes it, calling it classifies."""

    convs: tuple[ConvLayer, ...]
    logits_weight: Array  # [E, way, F + 1]; the last column is the bias
    present: Array  # [E, way], True for the classes that had a labelled support image
    norm: str  # "batch" or "support", whose statistics the query pass uses
    slope: float
    impl: str
    batched: bool  # False when the support set came without the leading E
    image_shape: tuple[int, ...]  # (H, W, C)
    check: bool = True  # look at the values of queries, too

    def __call__(self, query: Array, mask: Array | None = None) -> Array:
        """Logits of query images.

        Args:
            query: [E, m, H, W, C], or [m, H, W, C] if the support set came without E; values in [0, 1].
            mask: [E, m] or [m], False for padding, which is kept out of the norm statistics; None for no padding.

        Returns:
            [E, m, way], or [m, way]. A class without a labelled support image has logit -inf.

        Raises:
            InputError: images that do not fit the support images in shape, dtype or number of episodes; NaN pixels.
        """
        check_query(query, mask, self.logits_weight, self.image_shape, self.batched, values=self.check)
        if not self.batched:
            query, mask = query[None], None if mask is None else mask[None]
        x = query
        plain = all(conv.affine is None for conv in self.convs)  # then all blocks may be fused
        for convs in [self.convs] if plain else [(conv,) for conv in self.convs]:
            x, _ = conv_stack(
                x,
                [conv.weight for conv in convs],
                [conv.gamma for conv in convs],
                [conv.beta for conv in convs],
                [conv.bias for conv in convs],
                [conv.statistics for conv in convs] if self.norm == "support" else None,
                mask,
                self.slope,
                self.impl,
            )
            x = convs[-1].rescaled(x)
        logits = linear(x, self.logits_weight)  # [E, m, way]
        logits = namespace(logits).where(self.present[:, None, :], logits, -math.inf)
        return logits if self.batched else logits[0]

    def with_norm(self, norm: str) -> GeneratedCNN:
        """The same weights with the other norm mode."""
        if norm not in ("batch", "support"):
            raise InputError(f"norm is {norm!r}; choose batch or support")
        return dataclasses.replace(self, norm=norm)


def linear(x: Array, weight: Array) -> Array:
    """The logits layer on flattened activations: x [E, N, h, w, C], weight [E, way, F + 1] -> [E, N, way]."""
    flat = as_floats(x.reshape(*x.shape[:2], -1), weight)  # [E, N, F]
    return flat @ weight[..., :-1].mT + weight[:, None, :, -1]
