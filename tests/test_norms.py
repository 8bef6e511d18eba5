"""Norm statistics shrunk towards those learned over training tasks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, generic_statistics, seeds
from test_training import CONFIG, IMAGES
from tolerances import assert_all_close, assert_close, assert_different, contents

from mini_ht import draw_parameters, generate
from mini_ht.evaluation import evaluation_episodes
from mini_ht.kernels import conv_block
from mini_ht.norms import shrunk
from mini_ht.training.statistics import TASKS, learn_statistics

NAMES = ("mean", "variance")


@given(seed=seeds, share=st.floats(0, 1))
def test_shrunk_statistics_are_those_of_a_mixture(library, seed, share):
    """They are mean and variance of numbers of which `share` come from one population and the rest from the other."""
    rng = np.random.default_rng(seed)
    own, learned = rng.standard_normal((2, 3, 50)), 2 * rng.standard_normal((3, 40)) + 1  # [E, Cout, n] and [Cout, n']
    mean, variance = shrunk(
        (library.to(own.mean(-1)), library.to(own.var(-1))),
        (library.to(learned.mean(-1)), library.to(learned.var(-1))),
        share,
    )
    weights = np.repeat([(1 - share) / 50, share / 40], [50, 40])
    for e in range(2):
        both = np.concatenate([own[e], learned], axis=-1)  # [Cout, n + n']
        wanted = both @ weights
        assert_close(library.back(mean)[e], wanted)
        assert_close(library.back(variance)[e], ((both - wanted[:, None]) ** 2) @ weights)


@given(case=cases(norm="support", learned=True))
def test_the_support_pass_uses_what_the_query_pass_uses(library, case):
    """Each block's support activations are normalised by the statistics that its queries will meet.

    So a CNN called with norm "support" on its support set repeats the support pass: with the statistics that one more
    pass of the blocks finds, shrunk once more, nothing changes.
    """
    cnn, config = case.generate(library), case.config
    x = library.to(case.support)
    for number, conv in enumerate(cnn.convs, start=1):
        arguments = (x, conv.weight, conv.gamma, conv.beta)
        options = {"bias": conv.bias, "slope": config.slope, "mask": library.to(case.mask)}
        learned = (case.parameters[f"conv{number}.mean"], case.parameters[f"conv{number}.variance"])
        _, own = conv_block(*arguments, **options)
        share = 0 if config.discriminant and number == config.blocks else config.shrink
        wanted = shrunk(tuple(library.back(part) for part in own), learned, share)
        for found, should in zip(conv.statistics, wanted, strict=True):
            assert_close(library.back(found), should)
        x = conv.rescaled(conv_block(*arguments, **options, statistics=conv.statistics)[0])


@given(case=cases(norm="support", learned=True, shrink=1.0, episodes=(1, 1), discriminant=0), seed=seeds)
def test_at_share_1_statistics_are_learned_ones(library, case, seed):
    """With shrink 1 the statistics are the learned ones, whatever the support set."""
    for number, conv in enumerate(case.generate(library).convs, start=1):
        for found, name in zip(conv.statistics, ("mean", "variance"), strict=True):
            assert_close(library.back(found)[0], case.parameters[f"conv{number}.{name}"])


@given(case=cases(norm="batch", learned=True))
def test_norm_batch_does_not_look_at_them(library, case):
    """With norm "batch", and with shrink 0, learned statistics change nothing; with norm "support" they do."""
    plain = case.replace(parameters={k: v for k, v in case.parameters.items() if k.split(".")[1] not in NAMES})
    assert len(plain.parameters) < len(case.parameters)
    assert_all_close(contents(case.generate(library)), contents(plain.generate(library)))
    for shrink in (0.0, 0.5):
        config = dataclasses.replace(case.config, norm="support", shrink=shrink)
        with_them, without = (contents(x.replace(config=config).generate(library)) for x in (case, plain))
        if shrink:
            assert_different(with_them["mean1"], without["mean1"])
        else:
            assert_all_close(with_them, without)


@pytest.mark.parametrize("norm", ["batch", "support"])
def test_learned_statistics_are_those_of_all_tasks_together(norm):
    """They are mean and variance over the activations of all support images of 64 tasks, at any norm mode."""
    config = dataclasses.replace(CONFIG, norm=norm)
    parameters = draw_parameters(config, 1, np.float64)
    images = IMAGES["train"]
    learned = learn_statistics(parameters, config, images)
    task = {"way": config.way, "shot": config.shot, "queries": 1, "protocol": "released"}
    seen = []
    for batch in evaluation_episodes(images, TASKS, **task):
        cnn = generate(parameters, dataclasses.replace(config, norm="batch"), batch.support.astype(float), batch.labels)
        conv = cnn.convs[0]
        zero, one = np.zeros(config.channels), np.ones(config.channels)
        raw, _ = conv_block(batch.support.astype(float), conv.weight, one, zero, statistics=(zero[None], one[None]))
        seen.append(raw.reshape(-1, config.channels))  # [E * n * h * w, Cout]
    everything = np.concatenate(seen) * np.sqrt(1 + 1e-3)  # the norm divided by the root of 1 + NORM_EPS
    assert_close(learned["conv1.mean"], everything.mean(0))
    assert_close(learned["conv1.variance"], everything.var(0))
    assert learned.keys() == generic_statistics(config, 0).keys()
    again = learn_statistics(parameters | learned, config, images)
    assert_all_close(again, learned)
