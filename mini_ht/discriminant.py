"""The last conv's kernels, found by attention among class means: they tell the classes of this very task apart.

A kernel is a direction in which what the conv sees differs more between classes than within: Fisher's discriminant, in
which two classes count by how near they still are (as in Loog et al. 2001). In the paper transformers write all convs.
"""

from mini_ht.arrays import Array, Mask, Parameters, as_floats, belongs, namespace
from mini_ht.config import Config
from mini_ht.errors import InputError
from mini_ht.features import mean_neighbourhood
from mini_ht.plan import KERNEL, Layer, LocalConv

STEPS = 8  # that have a reach and a turn of their own; further ones are like the last

# Where training starts; all of these are learned, and lengths are in standard deviations within a class.
DEVIATION = 0.7  # of activations within a class, as expected before an image is seen
SEEN = 80.0  # images that this counts as
REACH = 2.0  # distance at which two means still repel each other
TURN = 2.0  # length of a step
LIFT = 12.0  # added to all answers of a kernel: ReLU lets them pass, and the pool takes the window that is all inside


def discriminant(parameters: Parameters, config: Config, layer: Layer, x: Array, labels: Array, mask: Mask) -> Array:
    """Kernels [E, 3, 3, Cin, Cout] of a conv with input x [E, n, h, w, Cin]; labels [E, n] in -1 .. way-1, mask [E, n].

    A step adds to the directions V the gradient of -sum over pairs of classes of exp(-d^2 / reach^2), d the distance of
    their means m along V, which bounds how often one is taken for the other, and makes V' S V = 1 again: each class
    mean attends to the others, most to the nearest. S, the spread within classes, mixes that of labelled images with a
    learned one, and measures gradient and step. Of maps larger than 3 x 3 the mean of all windows is seen. InputError:
    see `orthonormal`.
    """
    xp, (episodes, images) = namespace(x), x.shape[:2]
    start, prior, seen_before, lift, reach, turn = (
        parameters[f"{layer.name}.discriminant.{part}"] for part in ("start", "prior", "seen", "lift", "reach", "turn")
    )
    seen = mean_neighbourhood(x.reshape(-1, *x.shape[2:]), LocalConv(KERNEL, 1, layer.inputs, 0))  # [E * n, D]
    bright = parameters[f"conv{config.blocks - 1}.beta"]  # [Cin], the mean of x
    seen = as_floats(seen, start).reshape(-1, KERNEL**2, layer.inputs) - bright  # [E * n, 9, Cin]
    seen = seen.reshape(episodes, images, -1)  # [E, n, D]
    members = as_floats(belongs(labels, config.way, mask), start)  # [E, n, way]
    counts, there = members.sum(1)[..., None], as_floats(members.sum(1) > 0, start)  # [E, way, 1], [E, way]
    means = members.mT @ seen / counts.clip(1)  # [E, way, D]
    apart = (seen - members @ means) * members.sum(-1, keepdims=True)  # [E, n, D]; 0 for unlabelled images
    same = xp.eye(seen.shape[-1], dtype=start.dtype, device=start.device)  # [D, D]
    expected, weight = DEVIATION * same + prior, SEEN * xp.exp(seen_before)
    free = (counts[..., 0].sum(1) - there.sum(1))[:, None, None]  # [E, 1, 1]
    spread = (apart.mT @ apart + weight * (expected @ expected.mT)) / (free + weight) + 1e-3 * same  # [E, D, D]
    inverse = xp.linalg.solve(spread, means.mT)  # [E, D, way]
    directions = orthonormal(xp.broadcast_to(start, (episodes, *start.shape)), spread)  # [E, D, Cout]
    pairs = there[:, :, None] * there[:, None]  # [E, way, way]
    for step in range(config.discriminant):
        places = means @ directions  # [E, way, Cout]
        gaps = places[:, :, None] - places[:, None]  # [E, way, way, Cout]
        number = min(step, STEPS - 1)
        near = xp.exp(-(gaps**2).sum(-1) / (REACH * xp.exp(reach[number])) ** 2)  # [E, way, way]
        pushes = (near * pairs)[..., None] * gaps  # [E, way, way, Cout]
        gradient = inverse @ pushes.sum(2)  # [E, D, Cout]
        length = ((gradient * (spread @ gradient)).sum((1, 2), keepdims=True) + 1e-12) ** 0.5  # [E, 1, 1]
        directions = orthonormal(directions + TURN * xp.exp(turn[number]) * gradient / length, spread)
    up = LIFT * xp.exp(lift) * bright / (KERNEL**2 * (bright * bright).sum())  # [Cin]
    return directions.reshape(episodes, KERNEL, KERNEL, layer.inputs, -1) + up[:, None]


def orthonormal(directions: Array, spread: Array) -> Array:
    """The same span [E, D, Cout] with V' S V = 1, S [E, D, D], each direction in its sense (Gram-Schmidt).

    Raises InputError for directions without length, or (torch) not finite: NumPy passes NaN on.
    """
    linalg = namespace(directions).linalg
    try:
        root = linalg.cholesky(directions.mT @ spread @ directions)  # [E, Cout, Cout]
    except linalg.LinAlgError:
        came = "kernels of the last conv that are not finite, or not independent"
        raise InputError(f"the parameters give {came}; use others, or train with a lower learning_rate") from None
    return linalg.solve(root, directions.mT).mT
