r"""
04 Descend inside attention: one gradient step without a gradient
=================================================================

**What you will do.** Derive one step of gradient descent on a few labelled images, and have attention take it: no loss,
no gradient. Compare with torch's autograd to the last digit. Then see how good a classifier one step makes.

**What you will learn.** What the gradient of a linear softmax classifier looks like; why attention can hold it; what
the mean of the embeddings has to do with it; what more steps and longer steps change.

**What you need.** The class means of tutorial 03, and the derivative of a logarithm.

Many few-shot methods *adapt*: they start from a common classifier and take a few gradient steps on the support set. A
HyperTransformer takes none. The paper (appendix A) shows that a single such step is something that attention can do.
"""

import os

import matplotlib.pyplot as plt
import numpy as np
import torch

from mini_ht.attention import softmax
from mini_ht.constructions import as_array, gradient_step, make_tokens, prototypes, selectors
from mini_ht.datasets import open_dataset
from mini_ht.evaluation import Score, evaluation_episodes, pixel_nearest_mean

rng = np.random.default_rng(0)

# %%
# The step, derived
# -----------------
# The classifier is linear: row :math:`W_i` gives class :math:`i` the logit :math:`W_i \cdot e`. Append a 1 to every
# embedding :math:`e`, and the last number of a row is its bias. Let :math:`z_i` be the logits, :math:`p_i` their
# softmax, and :math:`y_i` 1 for the right class :math:`c` and 0 for others. The loss of one image is
#
# .. math::
#
#    -\log p_c = \log \sum_i \exp(z_i) - z_c
#
# Its derivative by :math:`z_i` is :math:`p_i - y_i`. As :math:`z_i = W_i \cdot e`, by row :math:`i` it is
# :math:`(p_i - y_i) e`.
#
# Where to start? Labels of an episode mean nothing: any class may be number 3. So the start should favour no class, and
# all rows are equal. Then all logits are equal, and :math:`p_i = 1 / \mathrm{way}` for every image. One step of size
# :math:`\gamma` on the mean loss of :math:`n` labelled images changes row :math:`i` by
#
# .. math::
#
#    \Delta W_i = \frac{\gamma}{n} \sum_{j=1}^{n} \left(y_i^j - \frac{1}{\mathrm{way}}\right) e^j
#
# Each image adds its embedding to the row of its class, and takes a little of it from all rows.


def with_one(e: np.ndarray) -> np.ndarray:
    """[..., F] -> [..., F + 1]."""
    return np.concatenate([e, np.ones_like(e[..., :1])], axis=-1)


way, shot, features = 5, 2, 3
labels = np.repeat(np.arange(way), shot)  # [n]
e = rng.standard_normal((way * shot, features))  # [n, F]
y = np.eye(way)[labels]  # [n, way]
derived = 0.1 * np.mean((y - 1 / way)[:, :, None] * with_one(e)[:, None], axis=0)  # [way, F + 1], gamma = 0.1

# %%
# Attention takes the step
# ------------------------
# A sum over images of a weight times :math:`e^j` is attention without its softmax: *linear attention*. The query of
# placeholder :math:`i` is its encoding. The key of an image is its encoding, less :math:`1 / \mathrm{way}` in each
# coordinate. Their product is :math:`y_i^j - 1 / \mathrm{way}`. The value is :math:`e^j`. One head with a softmax could
# not do this: its weights are never negative. (Exercise 2 takes two.)

placeholders, samples = make_tokens(labels[None], with_one(e)[None], way)  # [1, way, D], [1, n, D]
P, R = (as_array(matrix, e) for matrix in selectors(way, features + 1))  # encoding and embedding of a token
P = P[:, :way]  # the last coordinate of an encoding is for unlabelled images
query, key, value = placeholders @ P, samples @ P - 1 / way, samples @ R
by_attention = 0.1 / (way * shot) * (query @ key.mT @ value)[0]  # [way, F + 1]
assert np.allclose(by_attention, derived)
assert np.allclose(by_attention, gradient_step(labels[None], e[None], way, gamma=0.1)[0])
print("weights of class 0 over the images:", (query @ key.mT)[0, 0].round(1))

# %%
# The measured claim
# ------------------
# ``gradient_step`` is that, and it also leaves unlabelled images (label -1) out. It must be the true step for any
# number of images a class, from any start with equal rows. We need judges that know nothing of the derivation.
#
# The first is torch's autograd. The second only evaluates the loss, at :math:`W` and a little beside it. The usual
# difference :math:`(L(W + h) - L(W - h)) / 2h` subtracts numbers that are nearly equal, and with float64 gets no better
# than about 1e-10. A step along the imaginary axis subtracts nothing: :math:`L(W + ih)` is
# :math:`L(W) + ih L'(W)` and terms in :math:`h^2`. So the slope is the imaginary part divided by :math:`h`, and
# :math:`h` may be as small as 1e-30. That is exact up to rounding.


def loss(W: np.ndarray, e: np.ndarray, labels: np.ndarray) -> complex:
    """Mean cross-entropy; W [way, F + 1], real or complex."""
    logits = with_one(e) @ W.T  # [n, way]
    return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels])


def judged(e: np.ndarray, labels: np.ndarray, start: np.ndarray) -> list[np.ndarray]:
    """Gradients at start [way, F + 1] by real differences, by the imaginary step, by autograd."""
    units = np.eye(start.size).reshape(-1, *start.shape)
    real = [(loss(start + 1e-5 * u, e, labels) - loss(start - 1e-5 * u, e, labels)) / 2e-5 for u in units]
    imaginary = [loss(start + 1e-30j * u, e, labels).imag / 1e-30 for u in units]
    W = torch.tensor(start, requires_grad=True)
    torch.nn.functional.cross_entropy(torch.from_numpy(with_one(e)) @ W.T, torch.from_numpy(labels)).backward()
    return [np.reshape(real, start.shape), np.reshape(imaginary, start.shape), W.grad.numpy()]


errors = []
for _ in range(100):
    some = rng.integers(-1, way, 12)  # any balance, classes may be missing, some images unlabelled
    some[0] = 0
    x = rng.standard_normal((12, features))
    step = gradient_step(some[None], x[None], way, gamma=0.3)[0]
    equal_rows = np.tile(rng.standard_normal(features + 1), (way, 1))
    wanted = [-0.3 * gradient for gradient in judged(x[some >= 0], some[some >= 0], equal_rows)]
    errors.append([np.abs(step - other).max() / np.abs(other).max() for other in wanted])
real, imaginary, autograd = np.max(errors, axis=0)
print(f"largest relative error: real differences {real:.0e}, imaginary step {imaginary:.0e}, autograd {autograd:.0e}")
assert imaginary <= 1e-12 and autograd <= 1e-12 and real < 1e-6

# %%
# Look at a step
# --------------
# On pixels a row is a picture. Take one image of five characters each, and draw :math:`\Delta W_i`.

images = open_dataset("glyphs")["test"]
five = next(evaluation_episodes(images, 1, way=5, shot=1))
pixels = five.support.reshape(1, 5, -1).astype(np.float64)  # [E, n, F]
rows = gradient_step(five.labels, pixels, 5, gamma=5.0)[0, :, :-1].reshape(5, 28, 28)


def draw_step(rows: np.ndarray, support: np.ndarray) -> plt.Figure:
    """Above the support images [5, 28, 28], below what one step adds to their rows."""
    figure, axes = plt.subplots(2, 5, figsize=(7, 3), layout="constrained")
    for i in range(5):
        axes[0, i].imshow(support[i], cmap="gray_r", vmin=0, vmax=1)
        change = axes[1, i].imshow(rows[i], cmap="RdBu_r", vmin=-1, vmax=1)
        axes[0, i].set_title(f"class {i}", fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("support image")
    axes[1, 0].set_ylabel("change of the row")
    figure.colorbar(change, ax=axes[1], label="weight of a pixel")
    return figure


draw_step(rows, five.support[0, ..., 0])

# %%
# Red is a class's own ink. Blue is a fifth of everybody's ink, taken from all five rows alike. A part that all rows
# share moves all logits by the same amount, and the softmax does not feel it. With embeddings of mean zero it is not
# even there. The rest of row :math:`i` is :math:`\gamma / n` times the *sum* over its class. In tutorial 03
# ``prototypes`` made the *mean*. With :math:`\gamma = n` the two must differ by the number of images of the class,
# here 3, 2 and 1.

uneven = np.array([[0, 0, 0, 1, 1, 2]])  # [E, n]
x = rng.standard_normal((1, 6, features))
x -= x.mean(1, keepdims=True)
sums = gradient_step(uneven, x, 3, gamma=6.0)[0, :, :-1]  # [way, F], without the bias
means = prototypes(uneven, x, 3, beta=50.0, placeholders_as_keys=False)[0]
print("one step / class mean:", (sums / means).mean(1).round(3))
assert np.allclose(sums, np.array([[3], [2], [1]]) * means)

# %%
# One step as a classifier
# ------------------------
# Now 5-way 5-shot on glyphs, from a start of zeros. Two predictions before we measure.
#
# *The step size cannot matter* to the accuracy after one step: :math:`\gamma` multiplies all logits. It only sets how
# sure the classifier is.
#
# *The mean of the embeddings must matter.* A logit is a dot product with a class mean, and a class with much ink has a
# large one with every query. Subtract the mean of the support set from all pixels, and less of that is left.

count = 400 if os.environ.get("TUTORIAL_SIZE") == "full" else 100
(batch,) = evaluation_episodes(images, count, batch=count, way=5, shot=5)
support, query = (x.reshape(count, -1, 28 * 28).astype(np.float64) for x in (batch.support, batch.query))
centre = support.mean(1, keepdims=True)
sets = {"pixels": (support, query), "centred": (support - centre, query - centre)}


def score(logits: np.ndarray) -> Score:
    """Accuracy of logits [E, m, way]."""
    return Score.of((logits.argmax(-1) == batch.query_labels).mean(-1))


nearest, one_step = pixel_nearest_mean(iter([batch])), {}
print(f"nearest class mean: {nearest.accuracy:.1%} +- {nearest.interval:.1%}")
for name, (s, q) in sets.items():
    logits = [with_one(q) @ gradient_step(batch.labels, s, 5, gamma).mT for gamma in (0.01, 1.0)]
    assert np.mean(logits[0].argmax(-1) == logits[1].argmax(-1)) > 0.999  # all but ties that rounding decides
    one_step[name] = score(logits[0])
    print(f"one step on {name}: {one_step[name].accuracy:.1%} +- {one_step[name].interval:.1%}")
assert one_step["centred"].accuracy > one_step["pixels"].accuracy + 0.05

# %%
# More steps, longer steps
# ------------------------
# After the first step rows differ, and :math:`p` is no longer :math:`1 / \mathrm{way}` but depends on the images. Keys
# that know only labels cannot hold that. We go on explicitly. Each step adds weighted support embeddings, so a row is
# always :math:`\sum_j A_{ji} e^j`. It suffices to keep the weights :math:`A`: 25 numbers a class in place of 785.
#
# How long may a step be? As a function of its logits, the loss of an image has a curvature of at most 1/2. So as a
# function of :math:`W` the mean loss curves nowhere more than :math:`\lambda / 2`, with :math:`\lambda` the largest
# eigenvalue of :math:`\frac{1}{n} \sum_j e^j (e^j)^{\top}`. A step shorter than 2 / curvature never raises the support
# loss, so :math:`\gamma < 4 / \lambda` is safe. We measure step sizes in that unit.


def descend(s: np.ndarray, q: np.ndarray, size: float, steps: int) -> tuple[list, list]:
    """Logits [E, m, way] of the queries and support loss [E] after each step of gamma = size * 4 / lambda."""
    s, q = with_one(s), with_one(q)
    y, n = np.eye(5)[batch.labels], s.shape[1]  # y [E, n, way]
    gram, across = s @ s.mT, q @ s.mT  # [E, n, n], [E, m, n]
    gamma = size * 4 * n / np.linalg.eigvalsh(gram)[:, -1:, None]  # [E, 1, 1]
    A = np.zeros_like(y)
    logits, losses = [], []
    for _ in range(steps):
        A = A + gamma / n * (y - softmax(gram @ A))
        logits.append(across @ A)
        losses.append(cross_entropy(gram @ A, batch.labels))
    return logits, losses


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean over the images, computed safely for large logits: [E]."""
    shifted = logits - logits.max(-1, keepdims=True)
    right = np.take_along_axis(shifted, labels[..., None], -1)[..., 0]
    return (np.log(np.exp(shifted).sum(-1)) - right).mean(-1)


curves, after_one, sizes = {}, {}, np.logspace(-2, 2, 17)
for name, size in [("pixels", 0.1), ("pixels", 1.0), ("pixels", 30.0), ("centred", 1.0)]:
    logits, losses = descend(*sets[name], size, 200)
    curves[name, size] = np.array([score(x).accuracy for x in logits])
    rising = np.mean(np.diff([np.full(count, np.log(5)), *losses], axis=0) > 1e-12)
    after = ", ".join(f"{k}: {curves[name, size][k - 1]:.1%}" for k in (1, 2, 10, 200))
    print(f"{name}, step size {size:4}: accuracy after step {after}; loss rises in {rising:.1%} of the steps")
    assert size > 1 or rising == 0
for name in sets:
    after_one[name] = [cross_entropy(descend(*sets[name], x, 1)[0][0], batch.query_labels).mean() for x in sizes]


# %%
def draw_descent(curves: dict, after_one: dict) -> plt.Figure:
    """Left: accuracy against the number of steps. Right: what the size of the first step does to the query loss."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
    styles = [("#0072B2", ":"), ("#0072B2", "-"), ("#CC79A7", "-"), ("#D55E00", "-")]
    for ((name, size), accuracy), (colour, line) in zip(curves.items(), styles, strict=True):
        left.plot(range(1, 201), 100 * accuracy, line, color=colour, label=f"{name}, step {size:g}")
    left.axhline(100 * nearest.accuracy, color="#57606a", linestyle="--", linewidth=1, label="nearest mean")
    for (name, values), colour in zip(after_one.items(), ("#0072B2", "#D55E00"), strict=True):
        right.plot(sizes, values, color=colour, label=name)
    right.axhline(np.log(5), color="#57606a", linestyle="--", linewidth=1, label="guessing")
    left.set(xscale="log", xlabel="steps", ylabel="query accuracy (%)", ylim=(55, 80))
    right.set(xscale="log", xlabel=r"size of the first step ($4/\lambda$)", ylabel="query loss (nats)", ylim=(0, 4))
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return figure


draw_descent(curves, after_one)

# %%
# One step on pixels is poor. Further steps repair it: they take from the rows that win too often. Subtracting the mean
# does nearly all of that at once, and then more steps add little. Steps of 30 times the safe size overshoot; what they
# spoil is not fully repaired in 200 steps.
#
# On the right, the accuracy is the same all along a curve and the loss is not: too short a step leaves the classifier
# unsure, too long a step makes it sure of its mistakes.
#
# So a generator that imitates a single step loses little against a longer descent, *if* embeddings are centred. But
# nothing here is clearly better than the nearest mean, either. A real gain must come from better embeddings.

# %%
# Exercises
# ---------
# Write them into ``tutorials/exercises/exercise_04.py``; ``pytest -m exercise tutorials/exercises/exercise_04.py``
# checks them.
#
# **1. From anywhere.** Write the step from rows that are not equal. What takes the place of :math:`1 / \mathrm{way}`?
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def step_from(W, e, labels, gamma):
#           # The softmax of the logits that W gives now.
#           y = np.eye(len(W))[labels]
#           return gamma / len(e) * (y - softmax(e @ W.T)).T @ e
#
# **2. With a softmax after all.** With equally many images of each class, two heads of ``prototypes`` make the step
# exactly, at any :math:`\beta > 0` and for embeddings of any mean. What does the second head have to look at?
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def step_by_softmax(labels, e, way, gamma, beta):
#           # At beta 0 a head averages all images. From tutorial 03: the difference of the heads is the factor
#           # times (m_i - m). The step is gamma / way times (m_i - m).
#           own, everybody = (prototypes(labels, e, way, b, placeholders_as_keys=False) for b in (beta, 0.0))
#           factor = prototype_factor(labels.shape[1] // way, way, beta, placeholders_as_keys=False)
#           return gamma / way / factor * (own - everybody)
#
# **3. A fair step.** With uneven classes, sums favour the large ones. Take the step on a loss in which each class
# counts the same.
#
# .. dropdown:: Solution
#
#    .. code-block:: python
#
#       def fair_step(labels, e, way, gamma):
#           # Weights 1 / (way n_i) for 1 / n turn sums into means, as attention with a softmax has them.
#           y = np.eye(way)[labels]
#           means = y.T @ e / y.sum(0)[:, None]
#           return gamma / way * (means - means.mean(0))
