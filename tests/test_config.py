"""Config, presets and the checks of a support set: what is accepted, and what each error says."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, configs, make_case

from mini_ht import Config, InputError, draw_parameters, generate, preset, presets
from mini_ht.plan import plan

SMALL = Config(way=3, channels=2, blocks=1, image_size=8, layers=1, shared_features=4)


@given(config=configs())
def test_a_config_is_its_json(config):
    """`from_json` of `to_json` is the same Config."""
    text = config.to_json()
    assert "\n" not in text and Config.from_json(text) == config


@given(config=configs())
def test_the_plan_fits_together(config):
    """Every layer takes what the one before gives; a token has room for its parts, and for a slice read off it."""
    *convs, logits = plan(config)
    size, inputs = config.image_size, config.image_channels
    for number, layer in enumerate(convs, start=1):
        assert (layer.name, layer.size, layer.inputs, layer.outputs) == (f"conv{number}", size, inputs, config.channels)
        assert layer.generated == (number in config.generated_convs)
        weights = config.channels * (9 * inputs + config.generate_bias + 2 * config.generate_norm)
        assert layer.placeholders * layer.slice_length == weights
        size, inputs = size // 2, config.channels
    assert (logits.inputs, logits.outputs, logits.placeholders) == (size * size * inputs, config.way, config.way)
    assert logits.slice_length == logits.inputs + 1 and logits.generated
    for layer in (*convs, logits):
        features = config.shared_features + sum(conv.outputs for conv in layer.local)
        room = max(features, layer.slice_length) if config.readout == "slice" else features
        assert layer.token_width == config.encoding + room


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("all", (1, 2, 3, 4)), ("logits", ()), ("first1", (1,)), ("first4", (1, 2, 3, 4)), ("last2", (3, 4)),
        ("3", (3,)), ("3,1", (1, 3)), (" 1, 3 ", (1, 3)), ("2,2", (2,)),
    ],
)  # fmt: skip
def test_which_layers_are_generated(choice, wanted):
    """The words of `generate` name conv layers, counted from 1."""
    assert Config(generate=choice).generated_convs == wanted


@pytest.mark.parametrize(
    "choice",
    ["", ",", "none", "0", "5", "1,5", "1-3", "-1", "first", "first0", "first5", "last0", "last9", "²", "last²"],
)
def test_layers_that_do_not_exist(choice):
    """Other words, and layers that the CNN does not have, are InputErrors."""
    with pytest.raises(InputError, match=r"generate is .*; write all, logits, .* or layer numbers between 1 and 4"):
        Config(generate=choice)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[
            ({name: "other"}, rf"{name} is 'other'; choose one of ")
            for name in (
                "norm",
                "generator",
                "attention",
                "encoder",
                "activation",
                "allocation",
                "readout",
                "dataset",
                "split",
                "protocol",
            )
        ],
        *[
            ({name: 0}, rf"{name} is 0; it must be at least 1")
            for name in ("shot", "queries", "channels", "blocks", "encoding", "layers", "heads", "image_channels")
        ],
        *[
            ({name: -1}, rf"{name} is -1; it must be at least 0")
            for name in ("unlabelled", "shared_features", "local_features", "inner_width", "episodes", "seed")
        ],
        *[({name: -0.5}, rf"{name} is -0.5; it must be at least 0") for name in ("learning_rate", "warmup", "clip")],
        ({"way": 1}, r"way is 1; it must be at least 2"),
        ({"key_width": 0}, r"key_width is 0; it must be at least"),
        ({"value_width": 0}, r"value_width is 0; it must be at least"),
        ({"image_size": 15}, r"image_size 15 is too small: 4 blocks want at least 16 pixels"),
        ({"allocation": "spatial", "generate_bias": True}, r"'spatial' has no slice for a channel's bias"),
        ({"allocation": "spatial", "generate_norm": True}, r"'spatial' has no slice for a channel's bias or norm: use"),
        *[({name: 1.5}, rf"{name} is 1.5; it must be at most 1") for name in ("shrink", "decay", "turned")],
        *[({name: -0.1}, r"must each lie in \[0, 1\)") for name in ("ema", "label_smoothing", "slope")],
        *[({name: 1}, r"must each lie in \[0, 1\)") for name in ("ema", "label_smoothing", "slope")],
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_values_that_make_no_sense(fields, message):
    """One sentence with what came and what was expected."""
    with pytest.raises(InputError, match=message):
        Config(**fields)


@pytest.mark.parametrize(
    "fields", [{"way": "5"}, {"way": 2.5}, {"channels": None}, {"generate": None}, {"learning_rate": float("nan")}]
)
def test_values_of_another_type(fields):
    """Text, fractions, nothing and NaN in place of a number, as a checkpoint's metadata could hold, are InputErrors."""
    with pytest.raises(InputError, match=next(iter(fields))):
        Config(**fields)


def test_narrow_keys_still_have_a_width():
    """The least key and value width leave at least one coordinate a head, however narrow the tokens are."""
    config = Config(way=2, blocks=1, image_size=8, encoding=4, key_width=0.05, value_width=0.05, readout="linear",
                    shared_features=0, local_features=0, channels=1)  # fmt: skip
    case = make_case(config, 0, 1, 3, 2, False, False)
    assert np.isfinite(generate(case.parameters, config, case.support, case.labels).logits_weight).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"the configuration is not JSON"),
        ("[]", r"another version of mini_ht: list differ"),
        ('{"way": 3}', r"another version of mini_ht: .*blocks.* differ; use that version, or train again"),
        (Config().to_json()[:-1] + ', "colour": 1}', r"another version of mini_ht: colour differ"),
        (Config().to_json().replace('"way": 20', '"way": 1'), r"way is 1"),
    ],
)
def test_json_of_another_version(text, message):
    """JSON that is none, or has other fields or values, is an InputError."""
    with pytest.raises(InputError, match=message):
        Config.from_json(text)


def test_presets():
    """Every preset has a plan, is what its name says, and a mistyped name is answered with near ones."""
    for name, config in presets().items():
        assert preset(name) == config and plan(config)
        if name.startswith("omniglot-any"):
            assert name == f"omniglot-any-{config.channels}ch" and config.vary > 1 == config.shot
        elif name.startswith("omniglot"):
            _, way, shot, channels = name.removesuffix("-released").removesuffix("-logits").split("-")
            assert config.generate == ("logits" if name.endswith("-logits") else "all")
            assert (f"{config.way}way", f"{config.shot}shot", f"{config.channels}ch") == (way, shot, channels)
            assert config.readout == ("slice" if name.endswith("-released") else "linear")
    with pytest.raises(InputError, match=r"no preset 'omniglot-20way-1shot-9ch'; try omniglot-20way-1shot-8ch"):
        preset("omniglot-20way-1shot-9ch")
    with pytest.raises(InputError, match=r"no preset '§'; try quickstart.*lists them all"):
        preset("§")


# What `generate` says about a support set

CASE = make_case(SMALL, 0, 2, 4, 1, unlabelled=False, masked=False)


def nan_at(x):
    x = x.copy()
    x[1, 2, 3, 4, 0] = np.nan
    return x


BAD = {
    "size": ({"support": CASE.support[:, :, :7]}, r"support has shape \[2, 4, 7, 8, 1\]; wanted .*\(8, 8, 1\): resize"),
    "channels": ({"support": CASE.support[..., [0, 0, 0]]}, r"support has shape \[2, 4, 8, 8, 3\]; wanted"),
    "axes": ({"support": CASE.support[0, 0]}, r"support has shape \[8, 8, 1\]; wanted \[n, H, W, C\]"),
    "empty": ({"support": CASE.support[:, :0], "labels": CASE.labels[:, :0]}, r"\[2, 0, 8, 8, 1\]: there is no image"),
    "no episode": ({"support": CASE.support[:0], "labels": CASE.labels[:0]}, r"there is no image in it"),
    "bytes": ({"support": (CASE.support * 255).astype(np.uint8)}, r"support is a .*uint8 and .*float64: bring both"),
    "dtype": ({"support": CASE.support.astype(np.float32)}, r"float32 and the parameters are of .*float64: bring both"),
    "NaN": ({"support": nan_at(CASE.support)}, r"support holds pixels from nan to nan; wanted values in \[0, 1\]"),
    "infinite": ({"support": CASE.support + np.inf}, r"support holds pixels from inf to inf; wanted"),
    "as in bytes": ({"support": CASE.support * 255}, r"support holds pixels from .* to 25\d\.\d+; wanted values in"),
    "labels shape": ({"labels": CASE.labels[:, :3]}, r"labels: .* \[2, 3\] came; wanted integers .*\[2, 4\], one"),
    "labels dtype": ({"labels": CASE.labels.astype(np.float64)}, r"labels: .*float64 \[2, 4\] came; wanted integers"),
    "labels high": ({"labels": CASE.labels * 0 + 3}, r"labels run from 3 to 3; wanted -1 \(unlabelled\) \.\. 2"),
    "labels low": ({"labels": CASE.labels * 0 - 2}, r"labels run from -2 to -2; wanted -1"),
    "no label": ({"labels": np.array([[0, 1, 2, 0], [-1] * 4])}, r"an episode has no labelled image; give"),
    "all padding": ({"mask": np.array([[True] * 4, [False] * 4])}, r"an episode has no labelled image"),
    "mask shape": ({"mask": np.ones((2, 3), bool)}, r"mask: .*bool \[2, 3\] came; wanted booleans \[2, 4\]"),
    "mask dtype": ({"mask": np.ones((2, 4))}, r"mask: .*float64 \[2, 4\] came; wanted booleans"),
}


@pytest.mark.parametrize("bad", BAD)
def test_support_sets_that_do_not_fit(library, bad):
    """Each gets one sentence with what came and what was wanted, in both libraries."""
    changes, message = BAD[bad]
    with pytest.raises(InputError, match=message) as error:
        CASE.replace(**changes).generate(library)
    assert "\n" not in str(error.value)


def test_only_values_are_left_unchecked(library):
    """check=False skips the look at values, not at shapes and dtypes."""
    CASE.replace(**BAD["NaN"][0]).generate(library, check=False)
    for bad in ("size", "bytes", "labels shape", "mask dtype"):
        with pytest.raises(InputError, match=BAD[bad][1]):
            CASE.replace(**BAD[bad][0]).generate(library, check=False)


@pytest.mark.parametrize("bad", ["support", "labels", "mask"])
def test_arrays_of_two_libraries(library, bad):
    """Support, labels and mask come from the library of the parameters."""
    parts = {"support": CASE.support, "labels": CASE.labels, "mask": np.ones((2, 4), bool)}
    there = library.to(parts)
    there[bad] = torch.from_numpy(parts[bad].copy()) if library.name == "numpy" else parts[bad]
    with pytest.raises(InputError, match=bad):
        generate(library.to(CASE.parameters), SMALL, **there)


@pytest.mark.parametrize("bad", ["support", "labels", "mask"])
def test_lists_are_not_arrays(bad):
    """A list, as a newcomer may pass, is an InputError that says so."""
    parts = {"support": CASE.support, "labels": CASE.labels, "mask": np.ones((2, 4), bool)}
    parts[bad] = parts[bad].tolist()
    with pytest.raises(InputError, match=bad):
        generate(CASE.parameters, SMALL, **parts)


@given(case=cases(), dtype=st.sampled_from(["uint8", "int8", "int16", "int32", "int64"]))
def test_labels_of_any_integer_type(library, case, dtype):
    """Labels of every integer type give the same logits."""
    case = case.replace(labels=np.maximum(case.labels, 0))
    np.testing.assert_array_equal(case.replace(labels=case.labels.astype(dtype)).logits(library), case.logits(library))


@pytest.mark.parametrize("changes", [{"way": 4}, {"way": 2}, {"channels": 3}, {"layers": 2}, {"readout": "linear"}])
def test_parameters_of_another_config(changes):
    """Parameters that were drawn for another config are an InputError; with another `way` nothing else would notice."""
    other = dataclasses.replace(SMALL, **changes)
    labels = np.array([[0, 1, 1, 0]] * 2)
    with pytest.raises(InputError, match="config"):
        generate(CASE.parameters, other, CASE.support, labels)


def test_an_unknown_impl(library):
    """`impl` is checked by name and against the library of the arrays."""
    with pytest.raises(InputError, match=r"impl is 'fast'; choose auto"):
        CASE.generate(library, impl="fast")
    with pytest.raises(InputError, match=r"cannot compute on a"):
        CASE.generate(library, impl="torch" if library.name == "numpy" else "reference")
    own = CASE.generate(library, impl="reference" if library.name == "numpy" else "torch")
    np.testing.assert_array_equal(library.back(own.logits_weight), library.back(CASE.generate(library).logits_weight))


def test_parameters_are_checked_against_their_own_dtype():
    """Parameters in float64 want images in float64."""
    parameters = draw_parameters(SMALL, 0, np.float64)
    assert generate(parameters, SMALL, CASE.support, CASE.labels).logits_weight.dtype == np.float64
