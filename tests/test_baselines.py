"""The baselines by their laws: what the inner loop does, what MAML++ adds to MAML, distances to means; they learn."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import permutations, seeds
from tolerances import assert_close, assert_different

from mini_ht import Config, InputError
from mini_ht.baselines import training
from mini_ht.baselines.__main__ import main
from mini_ht.baselines.maml import adapt, inner_loop, maml_loss, network, step_shares
from mini_ht.baselines.method import NAMES, RECIPES, BaselineLayout, Method, draw
from mini_ht.baselines.prototypes import prototype_logits
from mini_ht.baselines.training import BaselineTrainer, episode_loss, load, train
from mini_ht.datasets import glyphs
from mini_ht.episodes import Episodes
from mini_ht.figures import read_metrics
from mini_ht.kernels import NORM_EPS
from mini_ht.training.checkpoint import STATE, VECTORS
from mini_ht.training.log import METRICS

CONFIG = Config(way=3, shot=1, queries=2, channels=3, blocks=2, image_size=8, slope=0.1, label_smoothing=0.1)
NORMS = st.sampled_from(["batch", "support"])
METHODS = st.sampled_from(["maml", "maml++"])


def case(method, seed, config=CONFIG, unlabelled=False):
    """Parameters as after some training, and support, labels, query, targets of 2 episodes, in float64."""
    rng = np.random.default_rng(seed)
    parameters = {
        name: torch.from_numpy(x + 0.2 * rng.standard_normal(x.shape)).requires_grad_()
        for name, x in draw(config, method).items()
    }
    labels = np.stack([rng.permutation(config.way * 2) % config.way for _ in range(2)])
    if unlabelled:
        labels = np.concatenate([labels, np.full((2, 2), -1)], axis=1)
    targets = rng.integers(0, config.way, 2 * 4)
    images = [torch.from_numpy(rng.random((2, count, 8, 8, 1))) for count in (labels.shape[1], 4)]
    return parameters, images[0], torch.from_numpy(labels), images[1], torch.from_numpy(targets)


def plain_features(parameters, step, weights, images, count):
    """One episode through the blocks, in torch's own words: [N, H, W, C] -> [N, F]; statistics of the first `count`."""
    x = images  # [N, H, W, C]
    for layer, weight in zip(("conv1", "conv2"), weights, strict=True):
        x = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), padding=1)  # [N, Cout, H, W]
        x = F.max_pool2d(F.leaky_relu(x, CONFIG.slope), 2).permute(0, 2, 3, 1)  # [N, h, w, Cout]
        mean, variance = x[:count].mean((0, 1, 2)), x[:count].var((0, 1, 2), correction=0)  # [Cout]
        gamma, beta = (parameters[f"{layer}.{part}"] for part in ("gamma", "beta"))
        x = (x - mean) / (variance + NORM_EPS).sqrt() * gamma[step % len(gamma)] + beta[step % len(beta)]
    return x.flatten(1)


def plain_logits(parameters, step, weights, images, count):
    """[N, way], of the features and the last of the weights, whose last column is the bias."""
    features = plain_features(parameters, step, weights[:-1], images, count)
    return F.linear(features, weights[-1][:, :-1], weights[-1][:, -1])


@given(name=METHODS, seed=seeds, norm=NORMS)
def test_inner_rate_zero_changes_nothing(name, seed, norm):
    """With inner rate 0 the adapted network is the initial one; with another rate it is not."""
    method = Method(name, steps=2, inner_rate=0.0)
    parameters, support, labels, query, _ = case(method, seed)
    initial = [parameters[f"{layer}.weight"].expand(2, *[-1] * parameters[f"{layer}.weight"].ndim)
               for layer in ("conv1", "conv2", "logits")]  # fmt: skip
    with torch.no_grad():
        still = network(parameters, CONFIG, initial, 1, support, labels, norm)(query)
    assert_close(adapt(parameters, CONFIG, method, support, labels, norm)(query), still)
    moved = adapt(parameters, CONFIG, dataclasses.replace(method, inner_rate=0.3), support, labels, norm)(query)
    assert_different(moved, still)


@given(name=METHODS, seed=seeds, unlabelled=st.booleans(), present=st.sampled_from([2, 3]))
def test_inner_steps_are_gradient_steps(name, seed, unlabelled, present):
    """Each step of each episode is weights - rate * gradient of its own support loss; it starts as learned."""
    method = Method(name, steps=2, inner_rate=0.3)
    parameters, support, labels, _, _ = case(method, seed, unlabelled=unlabelled)
    labels = labels.clamp(max=present - 1)
    found = list(inner_loop(parameters, CONFIG, method, support, labels))
    layers = ("conv1", "conv2", "logits")
    for episode in range(2):
        weights = [parameters[f"{layer}.weight"] for layer in layers]
        known = labels[episode] >= 0
        for step in range(2):
            logits = plain_logits(parameters, step, weights, support[episode], len(known))
            loss = F.cross_entropy(logits[known, :present], labels[episode][known])
            gradients = torch.autograd.grad(loss, weights)
            rates = [0.3 * (parameters[f"{layer}.rate"][step] if name == "maml++" else 1) for layer in layers]
            weights = [w - rate * g for w, rate, g in zip(weights, rates, gradients, strict=True)]
            for layer, weight, new in zip(layers, weights, found[step], strict=True):
                assert_close(new[episode], weight, what=f"step {step}, {layer}")


@given(seed=seeds, norm=NORMS)
def test_query_statistics(seed, norm):
    """Norm "batch": the queries' own statistics. Norm "support": those of the support images, and one query alone."""
    method = Method("maml++", steps=2, inner_rate=0.3)
    parameters, support, labels, query, _ = case(method, seed)
    cnn = adapt(parameters, CONFIG, method, support, labels, norm)
    weights = [*(conv.weight[1] for conv in cnn.convs), cnn.logits_weight[1]]
    first = support[1] if norm == "support" else query[1, :0]
    images = torch.cat([first, query[1]])  # [n + m, H, W, C] or [m, H, W, C]
    plain = plain_logits(parameters, 1, weights, images, len(first) or len(images))[len(first) :]
    assert_close(cnn(query)[1], plain)
    alone = torch.cat([cnn(query[:, i : i + 1]) for i in range(4)], dim=1)
    (assert_close if norm == "support" else assert_different)(alone, cnn(query))


@given(seed=seeds, norm=NORMS, done=st.floats(0, 1))
def test_maml_is_maml_plus_plus_with_everything_tied(seed, norm, done):
    """With norms equal in every step, factors 1 and nothing annealed, MAML++ has the loss and the gradient of MAML."""
    config, plain = dataclasses.replace(CONFIG, norm=norm), Method("maml", 3, 0.3)
    plus = Method("maml++", 3, 0.3, multi_step=0.0, first_order=0.0)
    parameters, support, labels, query, targets = case(plain, seed)
    tied = {name: x.detach().expand(3, -1) if x.shape[0] == 1 else x.detach() for name, x in parameters.items()}
    tied |= {f"{layer}.rate": torch.ones(3, dtype=torch.float64) for layer in ("conv1", "conv2", "logits")}
    tied = {name: x.clone().requires_grad_() for name, x in tied.items()}
    losses = []
    for method, leaves in ((plain, parameters), (plus, tied)):
        loss, accuracy = maml_loss(leaves, config, method, (support, query), (labels, targets), done)
        loss.backward()
        losses.append(torch.stack([loss.detach(), accuracy]))
    assert_close(*losses)
    for name, x in parameters.items():
        same = tied[name].grad
        assert_close(same.sum(0, keepdim=True) if x.shape[0] == 1 else same, x.grad, what=name)


@settings(max_examples=3)
@given(name=METHODS, seed=seeds, norm=NORMS, unlabelled=st.booleans())
def test_second_order_gradient(name, seed, norm, unlabelled):
    """The gradient of the outer loss is that of finite differences, through all inner steps; first order is not."""
    config = dataclasses.replace(CONFIG, norm=norm, way=2, channels=2, slope=0.5)
    method = Method(name, 2, 0.3, multi_step=1.0, first_order=0.0)
    parameters, support, labels, query, targets = case(method, seed, config, unlabelled)
    names = list(parameters)

    def loss(*leaves, method=method):
        leaves = dict(zip(names, leaves, strict=True))
        return maml_loss(leaves, config, method, (support, query), (labels, targets), 0.25)[0]

    leaves = list(parameters.values())
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    if name == "maml++":
        first = dataclasses.replace(method, first_order=1.0)
        exact, cheap = (torch.autograd.grad(loss(*leaves, method=m), leaves[0])[0] for m in (method, first))
        assert_different(cheap, exact)


@given(steps=st.integers(1, 6), multi_step=st.floats(0.01, 1), done=st.floats(0, 1))
def test_step_shares(steps, multi_step, done):
    """The shares of the steps sum to 1, are equal at the start, move to the last step, and all are there at the end."""
    method = Method("maml++", steps, multi_step=multi_step)
    np.testing.assert_allclose(step_shares(method, 0.0), 1 / steps)
    np.testing.assert_allclose(step_shares(method, 0.99 * multi_step)[:-1], 0.03 / steps)
    now, later = step_shares(method, done), step_shares(method, min(1.0, done + 0.1))
    assert now.sum() == pytest.approx(1) and (now >= 0).all() and later[-1] >= now[-1] - 1e-12
    for found in (step_shares(method, 1.0), step_shares(dataclasses.replace(method, name="maml"), done)):
        assert found[-1] == 1 and not found[:-1].any()


@given(seed=seeds, norm=NORMS, unlabelled=st.booleans(), absent=st.booleans())
def test_prototypes_are_nearest_means(seed, norm, unlabelled, absent):
    """Logits are minus the squared distances to class means, by loops; -inf for a class without an image."""
    method = Method("prototypes")
    parameters, support, labels, query, _ = case(method, seed, unlabelled=unlabelled)
    labels = labels.masked_fill(labels == 2, -1) if absent else labels
    found = prototype_logits(parameters, CONFIG, support, labels, query, norm)
    for episode in range(2):
        images, n = torch.cat([support[episode], query[episode]]), support.shape[1]  # [n + m, H, W, C]
        weights = [parameters[f"{layer}.weight"] for layer in ("conv1", "conv2")]
        features = plain_features(parameters, 0, weights, images, n if norm == "support" else len(images))
        for label in range(CONFIG.way):
            of_class = [features[i] for i in range(n) if labels[episode, i] == label]
            for i in range(query.shape[1]):
                if not of_class:
                    assert found[episode, i, label] == -torch.inf
                    continue
                distance = ((features[n + i] - sum(of_class) / len(of_class)) ** 2).sum()
                assert_close(found[episode, i, label], -distance)


@given(name=st.sampled_from(["prototypes", "maml", "maml++"]), seed=seeds, order=permutations(3), norm=NORMS)
def test_classes_may_be_renamed(name, seed, order, norm):
    """Renaming classes renames the logits alike; in MAML the rows of the initial logits weights go with them."""
    method, order = Method(name, 2, 0.3), torch.from_numpy(order)
    parameters, support, labels, query, _ = case(method, seed)

    def logits(p, names):
        if name == "prototypes":
            return prototype_logits(p, CONFIG, support, names, query, norm)
        return adapt(p, CONFIG, method, support, names, norm)(query)

    renamed = dict(parameters)
    if name != "prototypes":
        renamed["logits.weight"] = torch.empty_like(parameters["logits.weight"]).index_copy(
            0, order, parameters["logits.weight"].detach()
        )
    assert_close(logits(renamed, order[labels])[..., order], logits(parameters, labels))


def test_absent_classes_are_never_chosen():
    """A class without labelled images has logit -inf, and the other weights stay finite."""
    method = Method("maml++", 2, 0.3)
    parameters, support, labels, query, targets = case(method, 0)
    labels, targets = labels.masked_fill(labels == 2, 1), targets.clamp(max=1)
    logits = adapt(parameters, CONFIG, method, support, labels, "batch")(query)
    assert (logits[..., 2] == -torch.inf).all() and logits[..., :2].isfinite().all()
    config = dataclasses.replace(CONFIG, label_smoothing=0.0)
    maml_loss(parameters, config, method, (support, query), (labels, targets), 0.0)[0].backward()
    assert all(x.grad.isfinite().all() for x in parameters.values())


@pytest.mark.parametrize("name", NAMES)
def test_smoothed_labels_leave_absent_classes_out(name):
    """With smoothed labels, too, the loss is finite where a class has no labelled image."""
    method = Method(name, 2, 0.3)
    parameters, support, labels, query, targets = case(method, 0)
    labels, targets = labels.masked_fill(labels == 2, 1), targets.clamp(max=1)
    batch = Episodes(
        support.float().numpy(), labels.numpy(), query.float().numpy(), targets.reshape(query.shape[:2]).numpy(),
        *[np.zeros((len(support), CONFIG.way), int)] * 3,
    )  # fmt: skip
    configs = [dataclasses.replace(CONFIG, label_smoothing=share, precision="float32") for share in (0.0, 0.1)]
    parameters = {name: x.detach().float().requires_grad_() for name, x in parameters.items()}
    losses = [episode_loss(config, method, parameters, batch, 0.0)[0] for config in configs]
    assert all(loss.isfinite() for loss in losses) and losses[0] != losses[1]


SMALL = Config(
    **{"way": 5, "queries": 3, "channels": 6, "blocks": 2, "image_size": 14, "episodes": 320, "episodes_per_step": 8},
    **{"learning_rate": 1e-2, "conv_rate": 1.0, "dataset": "glyphs", "seed": 1, "precision": "float32"},
)


@pytest.fixture(scope="module")
def images():
    return {"train": glyphs(11, 60, drawings=8, size=14), "validation": glyphs(12, 30, drawings=8, size=14)}


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(tmp_path, images, name):
    """A few hundred episodes of built-in characters bring unseen ones far over chance; the log has its usual rows."""
    train(SMALL, Method(name, steps=3), images, tmp_path, quiet=True)
    last = read_metrics(tmp_path / METRICS)[-1]
    assert last["episodes"] == SMALL.episodes and last["episodes_per_second"] > 0
    assert last["validation_accuracy"] > 0.5, last  # chance is 0.2
    parameters, config, method = load(tmp_path)
    assert (config, method) == (SMALL, Method(name, steps=3))
    assert parameters.keys() == draw(config, method).keys()


@pytest.mark.parametrize("name", NAMES)
def test_convs_learn_at_their_rate(name, images, monkeypatch):
    """A first step moves the convs by `conv_rate` times the learning rate, all else by it; weights decay alike."""
    method, gradient = Method(name, steps=2), lambda *_: (torch.ones(trainer.layout.size), torch.zeros(2))
    for decay in (0.0, 0.5):
        config = dataclasses.replace(SMALL, conv_rate=8.0, weight_decay=decay, clip=0.0)
        trainer = BaselineTrainer(config, method, images["train"])
        monkeypatch.setattr(trainer.workers, "gradient", gradient)
        before = trainer.state.vector.clone()
        trainer.step(1e-3)
        views, moved = (trainer.layout.views(vector) for vector in (before, before - trainer.state.vector))
        assert views.keys() == draw(config, method).keys()
        for part, x in views.items():
            rate = 8.0 if part in ("conv1.weight", "conv2.weight") else 1.0
            assert_close(moved[part], 1e-3 * (rate + decay * x * part.endswith(".weight")), "float32", part)


def test_resume_is_exact(tmp_path, images, monkeypatch):
    """A run that Ctrl-C stopped half way and that was resumed ends in the same bits; another run is refused."""
    config, method = dataclasses.replace(SMALL, episodes=32, episodes_per_step=4), Method("maml++", 2, multi_step=0.5)
    only = {"train": images["train"]}
    seen, loss = [], training.episode_loss
    monkeypatch.setattr(training, "episode_loss", lambda *arguments: seen.append(arguments[-1]) or loss(*arguments))
    whole = train(config, method, only, tmp_path / "whole", quiet=True)
    assert seen == [step / 8 for step in range(8)]
    real = BaselineTrainer.step

    def stopped(self, *arguments, **options):
        if self.state.step == 3:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(BaselineTrainer, "step", stopped)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        train(config, method, only, tmp_path / "halves", quiet=True)
    monkeypatch.undo()
    with pytest.raises(InputError, match="another run"):
        train(config, dataclasses.replace(method, inner_rate=0.1), only, tmp_path / "halves", resume=True, quiet=True)
    with pytest.raises(InputError, match="holds a run already"):
        train(config, method, only, tmp_path / "halves", quiet=True)
    with pytest.raises(InputError, match="leave start out"):
        train(dataclasses.replace(config, start="omniglot"), method, only, tmp_path / "other", quiet=True)
    resumed = train(config, method, only, tmp_path / "halves", resume=True, quiet=True)
    assert resumed.step == whole.step == 8 and (resumed.loss, resumed.accuracy) == (whole.loss, whole.accuracy)
    for name in VECTORS:
        assert torch.equal(getattr(whole, name), getattr(resumed, name)), name
    fresh = BaselineLayout(config, method).join(draw(config, method))
    assert not torch.equal(whole.vector, fresh)
    (tmp_path / "model").mkdir()
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / "model")
    with pytest.raises(InputError, match="holds a run already"):
        train(config, method, only, tmp_path / "model", quiet=True)
    (tmp_path / "whole" / STATE).write_bytes(b"")
    with pytest.raises(InputError, match="another copy"):
        train(config, method, only, tmp_path / "whole", resume=True, quiet=True)


def test_the_command_line(tmp_path, capsys, monkeypatch):
    """train, evaluate and their mistakes: exit codes, JSON on one line, options that reach config and method."""
    sizes = ["--way", "3", "--channels", "2", "--blocks", "2", "--image-size", "8", "--episodes", "8"]
    run = ["train", "maml", "quickstart", *sizes, "--inner-rate", "0.7", "--run-dir", str(tmp_path / "run")]
    assert main(run) == 0 and main(run) == 2 and "holds a run" in capsys.readouterr().err
    _, config, method = load(tmp_path / "run")
    assert (config.way, config.episodes, method) == (3, 8, Method("maml", inner_rate=0.7))
    assert config == dataclasses.replace(config, **RECIPES["maml"])
    assert all({"conv_rate", "decay"} <= RECIPES[name].keys() for name in NAMES)  # presets are for generators
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "3", "--norm", "support", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["episodes"] == 3 and found["norm"] == "support" and 0 <= found["accuracy"] <= 1
    for wrong in ([], ["fly"], ["evaluate", str(tmp_path)]):
        assert main(wrong) == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert main([*run[:-1], str(tmp_path / "other"), "--multi-step", "2"]) == 2
