"""MAML (Finn et al. 2017) and MAML++ (Antoniou et al. 2019): a CNN that a few gradient steps adapt to a task.

The CNN is the one that a HyperTransformer generates. The inner loop takes `steps` gradient steps on the cross-entropy
of the labelled support images, for all episodes of a batch at once, and for all weights but those of the norms. MAML++
adds an inner learning rate for each layer and step, norm scales and offsets for each step, an outer loss after every
step with shares that move to the last one, and first derivatives only at the start. The outer rate warms up and falls
by a cosine.

Norm statistics are those of the images and weights at hand. (MAML++ keeps running ones for each step, too, but its
authors' code normalises with those of the batch, also in evaluation.) In the inner loop support images are normalised
among themselves. Where queries are classified, norm "batch" takes their own statistics, and norm "support" those of the
support images behind the same adapted weights and the same step's norms, so that one image can be classified alone.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mini_ht.baselines.method import Method
from mini_ht.cnn import ConvLayer, GeneratedCNN, linear
from mini_ht.config import Config
from mini_ht.generator import present_classes
from mini_ht.kernels import conv_stack
from mini_ht.training.workers import smoothed_cross_entropy

Parameters = Mapping[str, Tensor]

# The fused batch norm of the kernels has no second derivatives, statistics over a mask have them.
IMPL = "torch"
LEAST_SHARE = 0.03  # of its equal share that a step before the last one keeps in the loss


def layer_names(config: Config) -> list[str]:
    """conv1 ... convB, logits."""
    return [*(f"conv{number}" for number in range(1, config.blocks + 1)), "logits"]


def norms(parameters: Parameters, config: Config, step: int) -> list[list[Tensor]]:
    """Scales and offsets of all conv blocks at an inner step: two lists of [Cout]."""
    table = [[parameters[f"{name}.{part}"] for name in layer_names(config)[:-1]] for part in ("gamma", "beta")]
    return [[x[min(step, len(x) - 1)] for x in row] for row in table]


def initial_weights(parameters: Parameters, config: Config, episodes: int) -> list[Tensor]:
    """What every task starts from: [E, 3, 3, Cin, Cout] for each conv block, then [E, way, F + 1]."""
    weights = [parameters[f"{name}.weight"] for name in layer_names(config)]
    return [x.expand(episodes, *x.shape) for x in weights]  # one more axis, [E, ...]


def inner_loop(
    parameters: Parameters, config: Config, method: Method, support: Tensor, labels: Tensor, second_order: bool = False
) -> Iterator[list[Tensor]]:
    """The weights after each step, shaped as `initial_weights`; parameters must record gradients.

    support [E, n, H, W, C]; labels [E, n], -1 for unlabelled images, which count in norm statistics only. With
    second_order the steps' gradients pass on gradients themselves.
    """
    weights = initial_weights(parameters, config, len(support))
    mask = torch.ones_like(labels, dtype=torch.bool)
    absent = ~present_classes(labels, None, config.way)[:, None]  # [E, 1, way]
    counts = (labels >= 0).sum(1, keepdim=True).expand_as(labels).flatten()  # [E * n]
    for step in range(method.steps):
        x, _ = conv_stack(support, weights[:-1], *norms(parameters, config, step), None, None, mask, config.slope, IMPL)
        logits = linear(x, weights[-1]).masked_fill(absent, -torch.inf).flatten(0, 1)  # [E * n, way]
        losses = F.cross_entropy(logits, labels.flatten(), ignore_index=-1, reduction="none")  # [E * n]
        gradients = torch.autograd.grad((losses / counts).sum(), weights, create_graph=second_order)
        factors = [parameters[f"{name}.rate"][step] if method.plus else 1.0 for name in layer_names(config)]
        weights = [w - method.inner_rate * x * g for w, x, g in zip(weights, factors, gradients, strict=True)]
        yield weights


def network(
    parameters: Parameters, config: Config, weights: list[Tensor], step: int, support: Tensor, labels: Tensor, norm: str
) -> GeneratedCNN:
    """The classifier with the weights that an inner step left behind; support and labels as in `inner_loop`."""
    gammas, betas = norms(parameters, config, step)
    *convs, logits = weights
    _, statistics = conv_stack(support, convs, gammas, betas, slope=config.slope, impl=IMPL)
    layers = zip(convs, gammas, betas, statistics, strict=True)
    return GeneratedCNN(
        convs=tuple(ConvLayer(weight, None, gamma, beta, both) for weight, gamma, beta, both in layers),
        logits_weight=logits,
        present=present_classes(labels, None, config.way),
        norm=norm,
        slope=config.slope,
        impl=IMPL,
        batched=True,
        image_shape=tuple(support.shape[2:]),
        check=False,
    )


def adapt(
    parameters: Parameters, config: Config, method: Method, support: Tensor, labels: Tensor, norm: str
) -> GeneratedCNN:
    """The classifiers after the last inner step, without gradients; support and labels as in `inner_loop`."""
    with torch.enable_grad():
        leaves = {name: x.detach().requires_grad_() for name, x in parameters.items()}
        *_, weights = inner_loop(leaves, config, method, support, labels)
    with torch.no_grad():
        return network(parameters, config, [x.detach() for x in weights], method.steps - 1, support, labels, norm)


def step_shares(method: Method, done: float) -> NDArray[np.floating]:
    """Share [steps] of each inner step in the outer loss when `done` of the training, in [0, 1], is over."""
    shares = np.zeros(method.steps)
    if method.plus and done < method.multi_step:
        shares[:-1] = max(1 - done / method.multi_step, LEAST_SHARE) / method.steps
    shares[-1] = 1 - shares.sum()
    return shares


def maml_loss(
    parameters: Parameters,
    config: Config,
    method: Method,
    images: tuple[Tensor, Tensor],
    labels: tuple[Tensor, Tensor],
    done: float,
) -> tuple[Tensor, Tensor]:
    """Outer loss over the queries, and their accuracy after the last step (no gradient).

    images [E, n, ...] and [E, m, ...] and labels [E, n] and [E * m] are those of the support and of the query set;
    `done` is the share of the training, in [0, 1], that is over.
    """
    second_order = not (method.plus and done < method.first_order)
    shares, loss = step_shares(method, done), images[0].new_zeros(())
    for step, weights in enumerate(inner_loop(parameters, config, method, images[0], labels[0], second_order)):
        if shares[step]:
            cnn = network(parameters, config, weights, step, images[0], labels[0], config.norm)
            logits = cnn(images[1]).flatten(0, 1)  # [E * m, way]
            loss = loss + float(shares[step]) * smoothed_cross_entropy(logits, labels[1], config.label_smoothing)
    return loss, (logits.detach().argmax(-1) == labels[1]).to(loss.dtype).mean()
