"""Laws of the generator: what a support set's order, labels, padding and batching may change in the weights."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Case, cases, configs, make_case, permutations, seeds
from tolerances import assert_all_close, assert_close, assert_different, contents

from mini_ht import Config, attention, draw_parameters, generate, generator, preset, to_torch
from mini_ht.arrays import namespace
from mini_ht.plan import plan


@given(data=st.data())
def test_the_order_of_the_support_images_is_irrelevant(library, data):
    """A permutation of the support images, unlabelled and padded ones included, leaves every weight unchanged."""
    case = data.draw(cases(images=(2, 7)))
    order = data.draw(permutations(case.labels.shape[1]))
    assert_all_close(contents(case.index(order).generate(library)), contents(case.generate(library)))


@given(data=st.data())
def test_renaming_the_classes_permutes_the_logits_and_nothing_else(library, data):
    """Labels, the rows of every xi and the rows of the logits layer's mu permuted: so are the logits, and only they."""
    case = data.draw(cases())
    way = case.config.way
    order = data.draw(permutations(way))  # the new class c is the old class order[c]
    rename = np.append(np.argsort(order), -1)  # the last entry keeps -1, unlabelled
    rows = np.append(order, way)  # the last row of xi is that of unlabelled images
    renamed = {
        name: x[rows] if name.endswith(".xi") else x[order] if name == "logits.mu" else x
        for name, x in case.parameters.items()
    }
    other = case.replace(parameters=renamed, labels=rename[case.labels])
    before, after = contents(case.generate(library)), contents(other.generate(library))
    for name in ("logits", "present"):
        before[name] = before[name][:, order]
    assert_all_close(after, before)
    assert_close(other.logits(library), case.logits(library)[..., order])


@given(case=cases(), count=st.integers(1, 3), scale=st.sampled_from([0.0, 1.0, 1e6]), seed=seeds)
def test_padding_has_no_influence(library, case, count, scale, seed):
    """Masked-out images of any finite content and label change no weight, wherever they stand."""
    rng = np.random.default_rng(seed)
    episodes, images = case.labels.shape
    shape = (episodes, count)
    padded = case.replace(
        support=np.concatenate([case.support, scale * rng.standard_normal((*shape, *case.support.shape[2:]))], axis=1),
        labels=np.concatenate([case.labels, rng.integers(-1, case.config.way, shape)], axis=1),
        mask=np.concatenate([case.padding(), np.zeros(shape, bool)], axis=1),
    ).index(rng.permutation(images + count))
    assert_all_close(contents(padded.generate(library)), contents(case.generate(library)))


@given(case=cases(episodes=(2, 3)))
def test_a_batch_equals_its_episodes_one_by_one(library, case):
    """Episode e of a batch has the weights and logits that it has alone, with a leading E of 1 or without."""
    together, logits = contents(case.generate(library)), case.logits(library)
    for e in range(len(case.labels)):
        mask = None if case.mask is None else case.mask[e]
        parts = {"support": case.support[e], "labels": case.labels[e], "mask": mask, "query": case.query[e]}
        alone = case.replace(**parts)
        kept = case.replace(**{name: None if x is None else x[None] for name, x in parts.items()})
        wanted = {name: x[e : e + 1] for name, x in together.items()}
        assert_all_close(contents(kept.generate(library)), wanted)
        assert_all_close(contents(alone.generate(library)), wanted)
        assert_close(kept.logits(library), logits[e : e + 1])
        assert_close(alone.logits(library), logits[e])


def twice(case: Case) -> Case:
    return case.index(np.tile(np.arange(case.labels.shape[1]), 2))


@given(case=cases(attention="softmax", discriminant=0).filter(lambda case: case.config.generator != "separate"))
def test_a_support_set_twice_weighs_the_same_if_only_images_are_attended_to(library, case):
    """With placeholders as no one's keys, every image twice changes no weight: averages do not count repetitions."""
    placeholders = {f"{layer.name}.generator": layer.placeholders for layer in plan(case.config)}

    def images_as_keys(x, mask, name):
        mask = namespace(x).ones_like(x[..., 0]) > 0 if mask is None else mask
        first = x[:, : placeholders[name.removesuffix(".decoder")], 0]
        # No number is less than itself.
        return namespace(x).concat([first < first, mask[:, first.shape[1] :]], 1)

    def encoder(parameters, name, x, config, mask, outputs, memory=None):
        mask = images_as_keys(x if memory is None else memory, mask, name)
        return attention.encoder(parameters, name, x, config, mask, outputs, memory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "encoder", encoder)
        assert_all_close(contents(twice(case).generate(library)), contents(case.generate(library)))


@given(case=cases(generator="separate", attention="softmax", discriminant=0))
def test_a_support_set_twice_weighs_the_same_apart_from_the_placeholders(library, case):
    """Where images and placeholders never stand side by side as keys, every image twice changes no weight."""
    assert_all_close(contents(twice(case).generate(library)), contents(case.generate(library)))


WIDER = {"channels": 3, "shared_features": 4}


@given(
    case=cases(generator="joint", **WIDER) | cases(generator="decoder", **WIDER) | cases(attention="sigmoid", **WIDER)
)
def test_a_support_set_twice_weighs_more_against_the_placeholders(library, case):
    """Placeholders are keys as well, and keep their number: every image twice does change the generated weights.

    So it does where attention is a sum and no mean.
    """
    once, repeated = contents(case.generate(library)), contents(twice(case).generate(library))
    assert_different(repeated["logits"], once["logits"])
    for number in case.config.generated_convs:
        assert_different(repeated[f"conv{number}"], once[f"conv{number}"])


@pytest.mark.parametrize(
    ("choice", "generated"),
    [("all", {1, 2, 3}), ("logits", set()), ("first2", {1, 2}), ("last1", {3}), ("1,3", {1, 3}), ("2", {2})],
)
@given(case=cases(episodes=(2, 2), images=(3, 5), blocks=3), seed=seeds)
def test_only_the_chosen_layers_depend_on_the_task(library, choice, generated, case, seed):
    """Conv weights of layers that are not generated are the same for all tasks; all others differ between tasks."""
    fields = {"generate": choice, "discriminant": 0, "shared_features": 4, "way": 3, "channels": 3, "slope": 0.1}
    config = Config(**{**vars(case.config), **fields})
    case = make_case(config, seed, 2, 4, 2, unlabelled=True, masked=False)
    weights = contents(case.generate(library))
    for number in (1, 2, 3):
        one, other = weights[f"conv{number}"]
        if number in generated:
            assert_different(one, other, f"conv{number}")
        else:
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(one, case.parameters[f"conv{number}.weight"])
    assert_different(*weights["logits"])


@given(case=cases(queries=(2, 4)))
def test_an_absent_class_is_never_predicted(library, case):
    """A class without a labelled, unpadded support image has logit -inf, and the others have finite logits."""
    labels = np.where(case.padding(), case.labels, -1)
    present = (labels[..., None] == np.arange(case.config.way)).any(1)  # [E, way]
    logits = case.logits(library)
    wanted = np.broadcast_to(present[:, None], logits.shape)
    np.testing.assert_array_equal(np.isfinite(logits), wanted)
    assert (logits[~wanted] == -np.inf).all()


@given(case=cases(channels=3), seed=seeds)
def test_what_the_encoder_of_each_generator_sees(library, case, seed):
    """Joint and decoder: the placeholders, then the images. Separate: the images alone. Only a decoder sees memory."""
    kind, images, seen = case.config.generator, case.labels.shape[1], {}

    def encoder(parameters, name, x, config, mask, outputs, memory=None):
        keys = None if memory is None else memory.shape[1]
        seen[name] = (x.shape[1], outputs, None if mask is None else mask.shape[1], keys)
        return attention.encoder(parameters, name, x, config, mask, outputs, memory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "encoder", encoder)
        case.generate(library)
    wanted = {}
    for layer in plan(case.config):
        if not layer.generated or layer.discriminant:
            continue
        name, count = f"{layer.name}.generator", layer.placeholders
        total = images + (0 if kind == "separate" else count)
        masked = None if case.mask is None else total
        wanted[name] = (total, count if kind == "joint" else total, masked, None)
        wanted |= {} if kind == "joint" else {f"{name}.decoder": (count, count, masked, total)}
    assert seen == wanted


@given(case=cases(generate_norm=True, allocation="output", generate="all"))
def test_a_generated_norm_starts_as_the_learned_one(library, case):
    """Fresh parameters, whose gates are 0, generate scales and offsets of 0: the CNN is that of a learned norm."""
    case = case.replace(parameters=draw_parameters(case.config, 0, np.float64))
    cnn = case.generate(library)
    for conv in cnn.convs:
        assert all((library.back(part) == 0).all() for part in conv.affine)
    plain = dataclasses.replace(cnn, convs=tuple(dataclasses.replace(conv, affine=None) for conv in cnn.convs))
    query = library.to(case.query)
    np.testing.assert_allclose(library.back(cnn(query)), library.back(plain(query)), rtol=1e-9, atol=1e-9)


# A norm over one image of 1 x 1 pixels divides rounding errors by sqrt(NORM_EPS): in float32, with one query, both
# libraries are then up to 2e-4 from the float64 result, and from each other. With three of each they are well within.
# The last conv's kernels by class means answer around `discriminant.LIFT`, with as many times the rounding: see there.
ENOUGH = {"float64": (1, 5), "float32": (3, 5)}
PINNED = {"float64": {}, "float32": {"discriminant": 0}}


@given(data=st.data(), dtype=st.sampled_from(["float64", "float32"]))
def test_numpy_and_torch_agree(data, dtype):
    """NumPy, torch that records gradients and torch that does not give the same logits, in the dtype that came in."""
    case = data.draw(cases(images=ENOUGH[dtype], queries=ENOUGH[dtype], **PINNED[dtype]))
    parameters = {name: x.astype(dtype) for name, x in case.parameters.items()}
    support, query = case.support.astype(dtype), case.query.astype(dtype)
    ours = generate(parameters, case.config, support, case.labels, case.mask)(query)
    assert ours.dtype == dtype
    tensors = [None if x is None else torch.from_numpy(x) for x in (support, case.labels, case.mask)]
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            logits = generate(to_torch(parameters), case.config, *tensors)(torch.from_numpy(query))
        assert logits.requires_grad == recording and logits.dtype == getattr(torch, dtype)
        assert_close(ours, logits, dtype)


@pytest.mark.parametrize("name", ["omniglot-20way-1shot-8ch", "omniglot-20way-5shot-8ch-released"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("norm", ["batch", "support"])
def test_numpy_and_torch_agree_at_full_size(name, dtype, norm):
    """The same logits at the size of a real preset."""
    config = preset(name)
    parameters = draw_parameters(config, 0, getattr(np, dtype))
    rng = np.random.default_rng(0)
    images, queries = config.way * config.shot, config.way * config.queries
    support, query = ((rng.random((2, n, 28, 28, 1)) < 0.2).astype(dtype) for n in (images, queries))
    labels = np.tile(np.arange(config.way), (2, config.shot))
    ours = generate(parameters, config, support, labels).with_norm(norm)(query)
    tensors = (torch.from_numpy(x) for x in (support, labels))
    theirs = generate(to_torch(parameters), config, *tensors).with_norm(norm)(torch.from_numpy(query))
    assert ours.dtype == dtype and theirs.dtype == getattr(torch, dtype)
    assert_close(ours, theirs, dtype)


# Gradients

# At least this wide, a ReLU layer with random weights never falls silent as a whole. The CNN's activation is leaky, as
# sigmoid attention may write nearly the same kernel everywhere, and then all of its channels fall silent at once.
WIDE = {"way": 3, "channels": 5, "slope": 0.01, "shared_features": 8, "local_features": 8, "image_size": 12}


def gradients(case: Case, loss) -> dict[str, np.ndarray]:
    """The gradient of loss(logits) in each parameter, on torch."""
    parameters = to_torch(case.parameters)
    labels = case.labels.copy()
    labels[:, :4] = [0, 1, 2, -1]  # every class and an unlabelled image
    support, query = torch.from_numpy(case.support), torch.from_numpy(case.query)
    loss(generate(parameters, case.config, support, torch.from_numpy(labels))(query)).backward()
    return {name: np.zeros(x.shape) if x.grad is None else x.grad.numpy() for name, x in parameters.items()}


def full_cases(**fixed):
    """Cases in which nothing is too small or missing for a gradient."""

    def build(config: Config, seed: int) -> Case:
        case = make_case(config, seed, 2, 6, 4, unlabelled=True, masked=False)
        if config.attention == "sigmoid":  # keys start as queries: scores are sums of squares, and saturate it at 1
            tame = {name: 0.01 * x for name, x in case.parameters.items() if name.endswith(".query")}
            case = dataclasses.replace(case, parameters=case.parameters | tame)
        return case

    return st.builds(build, configs(**(WIDE | fixed)), seeds)


@given(case=full_cases())
def test_every_parameter_has_a_gradient(case):
    """With an unlabelled image and every class present, the logits depend on every parameter."""
    rng = np.random.default_rng(0)
    found = gradients(case, lambda logits: (logits * torch.from_numpy(rng.standard_normal(logits.shape))).sum())
    scale = max(np.abs(g).max() for g in found.values())
    for name, gradient in found.items():
        assert np.isfinite(gradient).all(), name
        assert np.abs(gradient).max() > 1e-12 * scale, f"{name} has no gradient"
        if name.endswith(".xi") or name == "logits.mu":
            assert (np.abs(gradient).max(1) > 0).all(), f"a row of {name} has no gradient"


def same_for_every_class(config: Config) -> set[str]:
    """The parameters that add the same vector to the logits layer's slice of every class."""
    stack = "" if config.generator == "joint" else "decoder."
    norm = "inner_norm" if config.inner_width else "attention_norm"
    last = "norm" if config.encoder == "pre-norm" else f"layer{config.layers - 1}.{norm}"
    return {f"logits.generator.{stack}{last}_offset"} | (
        {"logits.readout.bias"} if config.readout == "linear" else set()
    )


@given(case=full_cases())
def test_cross_entropy_leaves_out_only_what_shifts_all_classes_alike(case):
    """Softmax does not feel a shift of all logits: the logits layer's last offsets, and they alone, have gradient 0."""
    target = torch.tensor([[0, 1, 2, 0]] * len(case.query)).flatten()
    found = gradients(case, lambda logits: torch.nn.functional.cross_entropy(logits.flatten(0, 1), target))
    scale = max(np.abs(g).max() for g in found.values())
    silent = {name for name, gradient in found.items() if np.abs(gradient).max() < 1e-12 * scale}
    assert silent == same_for_every_class(case.config)


def test_an_unlabelled_row_needs_an_unlabelled_image():
    """Without unlabelled images the last row of each xi, and no other, has gradient 0."""
    case = make_case(Config(blocks=2, layers=1, **WIDE), 0, 2, 6, 4, unlabelled=False, masked=False)
    parameters = to_torch(case.parameters)
    labels = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    cnn = generate(parameters, case.config, torch.from_numpy(case.support), labels)
    cnn(torch.from_numpy(case.query)).square().sum().backward()
    for name in ("conv1.xi", "conv2.xi", "logits.xi"):
        assert parameters[name].grad[-1].abs().max() == 0 < parameters[name].grad[:-1].abs().amax(1).min()
