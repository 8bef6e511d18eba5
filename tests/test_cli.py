"""The command line: what it prints and leaves on disk, and one sentence for whatever is wrong with the input."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mini_ht import datasets, draw_parameters, load, preset, presets
from mini_ht.cli import main
from mini_ht.plan import plan
from mini_ht.training import loop, report

TINY = (
    "--episodes 8 --way 2 --queries 2 --channels 2 --blocks 2 --image-size 8 --encoding 8 --layers 1 "
    "--shared-features 4 --local-features 2 --episodes-per-step 4 --workers 1"
).split()
FILES = {"model.safetensors", "training.safetensors", "metrics.jsonl", "summary.json", "curve.png", "episode.png"}
real_glyphs = datasets.glyphs
alphabets: dict = {}


def few_glyphs(seed, classes, *, size):
    """A dozen characters instead of hundreds, drawn once."""
    if (seed, size) not in alphabets:
        alphabets[seed, size] = real_glyphs(seed, 12, size=size)
    return alphabets[seed, size]


@pytest.fixture(autouse=True)
def small_world(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets, "glyphs", few_glyphs)
    monkeypatch.setattr(report, "EPISODES", 10)
    monkeypatch.setattr(loop, "VALIDATION_EPISODES", 8)
    monkeypatch.setenv("MINI_HT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, trained once."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "glyphs", few_glyphs)
        patch.setattr(report, "EPISODES", 10)
        assert main(["train", "quickstart", "--run-dir", str(folder), *TINY]) == 0
    return folder


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """call(words...) in an empty folder -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # tyro's way
            code = stop.code
        return code, *capsys.readouterr()

    return run


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(result, *words):
    """Exit code 2, nothing on stdout, on stderr one line that begins mini-ht: and has these words."""
    code, out, err = result
    assert code == 2 and "Traceback" not in err and not out, result
    line = err.strip("\n").rpartition("\r")[2].splitlines()
    assert len(line) == 1 and line[0].startswith("mini-ht: "), err
    for word in words:
        assert str(word) in line[0], err


def copy_of(run, folder):
    folder.mkdir()
    for name, data in contents(run).items():
        if "/" not in name:
            (folder / name).write_bytes(data)
    return folder


# What works


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_usage(call, words):
    """Without words, or asked for help, the four commands are explained."""
    code, out, err = call(*words)
    assert code == 0 and not err
    assert all(f"mini-ht {command}" in out for command in ("train", "evaluate", "bench", "presets"))


def test_help_explains_config(call):
    """The help of train has the fields of Config with their documentation."""
    code, out, _ = call("train", "--help")
    flat = " ".join(out.replace("│", " ").split())
    assert code == 0 and "--learning-rate" in flat and "Peak learning rate of AdamW" in flat and "--run-dir" in flat
    assert "--generator {joint,decoder,separate} joint: an encoder over all tokens; decoder: " in flat
    assert not re.search(r"([,;:]|\b(or|and)) \(default", flat)  # no help ends in mid-sentence


def test_presets(call):
    """All presets are listed, with the number of trained parameters and the size of the CNN."""
    code, out, _ = call("presets")
    rows = {line.split()[0]: line.replace(",", "").split()[1:3] for line in out.splitlines()[1:]}
    assert code == 0 and rows.keys() == presets().keys() and "omniglot-20way-1shot-8ch-released" in rows
    for name in ("quickstart", "omniglot-20way-1shot-8ch", "omniglot-20way-5shot-64ch-released"):
        config = preset(name)
        c, side = config.channels, config.image_size // 2**config.blocks
        cnn = 9 * c * (config.image_channels + 3 * c) + 2 * 4 * c + config.way * (side * side * c + 1)
        generator = sum(x.size for x in draw_parameters(config).values())
        assert [int(word) for word in rows[name]] == [generator, cnn] and len(plan(config)) == 5


def test_train(trained):
    """A run leaves the model, the state, metrics, a summary with all keys, two figures and a TensorBoard log."""
    assert {p.name for p in trained.iterdir()} == FILES | {"tensorboard"}
    summary = json.loads((trained / "summary.json").read_text())
    keys = {"accuracy", "interval", "chance", "pixel_nearest_mean", "episodes", "episodes_per_second", "seconds"}
    assert keys | {"config"} <= summary.keys()
    assert summary["chance"] == 0.5 and summary["episodes"] == 8 and 0 <= summary["accuracy"] <= 1
    assert summary["config"]["channels"] == 2 and load(trained)[1].channels == 2
    row = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["episodes"] == 8 and row["validation_accuracy"] is not None
    assert all((trained / name).read_bytes().startswith(b"\x89PNG") for name in ("curve.png", "episode.png"))
    assert any((trained / "tensorboard").iterdir())


def test_evaluate(call, trained):
    """evaluate prints one line of JSON that says what was measured, the same each time, for a file as for a folder."""
    code, out, _ = call("evaluate", trained, "--episodes", 20, "--json")
    found = json.loads(out)
    keys = {"accuracy", "interval", "episodes", "protocol", "norm", "split", "way", "shot", "seconds"}
    assert code == 0 and keys <= found.keys()
    usual = {"episodes": 20, "protocol": "disjoint", "norm": "batch", "way": 2, "shot": 1, "chance": 0.5}
    assert {key: found[key] for key in usual} == usual
    again = json.loads(call("evaluate", trained / "model.safetensors", "--episodes", 20, "--json")[1])
    assert again | {"seconds": 0} == found | {"seconds": 0}
    code, text, _ = call("evaluate", trained, "--episodes", 20)
    assert code == 0 and f"{100 * found['accuracy']:.2f} +- {100 * found['interval']:.2f} %" in text


def test_evaluate_otherwise(call, trained):
    """Norm, protocol, shot, part and seed can be chosen, and the answer says so."""
    chosen = {"norm": "support", "protocol": "released", "shot": 3, "part": "validation", "seed": 4, "queries": 2}
    words = [word for key, value in chosen.items() for word in (f"--{key}", value)]
    code, out, _ = call("evaluate", trained, "--episodes", 10, "--json", *words)
    assert code == 0 and json.loads(out).items() >= chosen.items()


def test_evaluate_says_what_was_measured(call, trained):
    """The text names the part and what is unlike the usual; a split that the data set does not have is refused."""
    for part, words in (("test", "unseen"), ("validation", "validation"), ("train", "train")):
        _, out, err = call("evaluate", trained, "--episodes", 10, "--part", part, "--unlabelled", 1, "--views", 5)
        assert f"10 episodes of {words} classes" in out and "norm batch, 1 unlabelled, 5 views\n" in out and not err
    refused(call("evaluate", trained, "--episodes", 10, "--split", "alphabet"), "for omniglot", "trained on glyphs")
    for words in (("evaluate", trained, "--episodes", 10), ("train", "quickstart", *TINY)):
        refused(call(*words, "--data-dir", "photos"), "'glyphs' is built in", "--dataset")


def test_resume_and_overwrite(call, trained, tmp_path):
    """A folder with a run is refused; --resume goes on with the run's own config; --overwrite starts again."""
    run = copy_of(trained, tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    before = contents(run)
    refused(call("train", "quickstart", "--run-dir", run, *TINY), "holds a run already", "--resume")
    assert contents(run) == before
    code, out, _ = call("train", "quickstart", "--run-dir", run, "--resume", "--episodes", 16, "--workers", 1)
    assert code == 0 and "16 training episodes" in out
    assert json.loads((run / "summary.json").read_text())["config"]["channels"] == 2
    code, out, _ = call("train", "quickstart", "--run-dir", run, "--overwrite", *TINY, "--seed", 5)
    assert code == 0 and "8 training episodes" in out and load(run)[1].seed == 5
    assert (run / "notes.txt").read_text() == "mine"


def test_folder_round_trip(call, tmp_path):
    """Class folders of colour PNGs of any size are trained on, and evaluated with fewer classes, too."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 3)):
        for label in range(count):
            (tmp_path / "data" / part / f"{part}{label}").mkdir(parents=True)
            for number in range(5):
                pixels = rng.integers(0, 40, (10, 13 + number, 3)) + np.array([200, 60 * label, 0])
                image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                image.save(tmp_path / "data" / part / f"{part}{label}" / f"{number}.png")
    options = ["--dataset", "folder", "--data-dir", "data", "--run-dir", "run", "--image-channels", 3]
    code, out, _ = call("train", "quickstart", *TINY, *options, "--way", 3)
    assert code == 0 and "3-way 1-shot" in out
    words = "evaluate run --data-dir data --episodes 10 --way 2 --shot 2 --queries 3 --json".split()
    code, out, _ = call(*words)
    found = json.loads(out)
    assert code == 0 and (found["way"], found["shot"], found["chance"]) == (2, 2, 0.5)
    before = contents(tmp_path)
    for words in (("--queries", 5), ("--part", "validation"), ("--way", 4)):
        refused(call("evaluate", "run", "--data-dir", "data", "--episodes", 10, *words))
    refused(call("evaluate", "run", "--data-dir", "data", "--queries", 5), "has 5 images; wanted 6")
    refused(call("evaluate", "run"), "data directory")
    refused(call("train", "quickstart", *TINY, *options, "--data-dir", "none", "--overwrite"), "none")
    assert contents(tmp_path) == before


def test_interrupt(call, tmp_path, monkeypatch):
    """Ctrl-C ends with exit code 130, a sentence on how to go on, and a checkpoint."""

    def interrupt(self, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Trainer, "step", interrupt)
    code, _, err = call("train", "quickstart", "--run-dir", "run", *TINY)
    assert code == 130 and "--resume" in err and "Traceback" not in err
    assert load(tmp_path / "run")[1].way == 2 and int(load_file("run/training.safetensors")["vector/logits.mu"].any())


# Bad input


def test_a_value_that_is_no_choice(call, trained):
    """What the option parser itself refuses ends with exit code 2 and the choices, without traceback."""
    code, out, err = call("evaluate", trained, "--norm", "x")
    assert code == 2 and not out and "support" in err and "Traceback" not in err


def bad(*words, contains=()):
    return pytest.param(words, contains, id=" ".join(words[-2:]))


RUN = "RUN"  # stands for the trained run's folder
FRESH = ("train", "quickstart", *TINY, "--run-dir", "new")
MEASURE = ("evaluate", RUN, "--episodes", "5")
OMNIGLOT = ("train", "omniglot-20way-1shot-8ch", "--run-dir", "new", "--data-dir")


@pytest.mark.parametrize(
    "words, contains",
    [
        bad("frobnicate", contains=("frobnicate", "train")),
        bad("train", "omniglot-20way-1shot-9ch", contains=("omniglot-20way-1shot-8ch,",)),
        bad("bench", "train", "quickstrat", contains=("quickstrat", "quickstart.")),
        bad("evaluate", "nowhere", contains=("nowhere", "no checkpoint")),
        bad("train", "quickstart", "--resume", contains=("no checkpoint", "quickstart")),
        bad(*OMNIGLOT, "nowhere", contains=("images_background.zip",)),
        bad(*OMNIGLOT, "wrong", contains=("images_background.zip", "expected 964 characters")),
        bad(*FRESH, "--image-channels", "3", contains=("glyphs", "1 channel")),
        bad(*FRESH[:-1], "taken", contains=("taken", "another folder")),
        bad(*MEASURE, "--way", "3", contains=("way is 3", "2 .. 2")),
        bad(*MEASURE, "--shot", "30", contains=("20 images", "wanted 35")),
        bad("evaluate", RUN, "--episodes", "0", contains=("at least 1",)),
        bad(*MEASURE, "--queries", "-1"),
        bad(*FRESH, "--seed", "-1"),
        bad(*MEASURE, "--way", "0"),
        bad(*MEASURE, "--shot", "0"),
        bad(*MEASURE, "--shot", "-1"),
        bad(*MEASURE, "--queries", "0"),
        bad(*MEASURE, "--seed", "-1"),
        bad(*FRESH, "--workers", "-1"),
        bad(*FRESH, "--learning-rate", "nan"),
        bad(*FRESH, "--way", "50"),
        bad("train", *FRESH[2:], "nonsense"),
    ],
)
def test_bad_input(call, trained, tmp_path, words, contains):
    """Each mistake gets one line and exit code 2, and changes nothing on disk."""
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "wrong").mkdir()
    for name in ("images_background.zip", "images_evaluation.zip"):
        (tmp_path / "wrong" / name).write_bytes(b"PK, but no archive")
    before, of_run = contents(tmp_path), contents(trained)
    refused(call(*(trained if word == RUN else word for word in words)), *contains)
    assert contents(tmp_path) == before and contents(trained) == of_run


@pytest.mark.parametrize("words, name", [(("evaluate", "run"), "model"), (("train", "--resume"), "training")])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.9])
def test_cut_short_checkpoint(call, trained, tmp_path, words, name, share):
    """A checkpoint that is cut short is named, and stays as it is."""
    file = copy_of(trained, tmp_path / "run") / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    before = contents(tmp_path)
    more = ("--run-dir", "run", "--workers", 1) if words[0] == "train" else ()
    refused(call(*words, *more), file.name, "cut short")
    assert contents(tmp_path) == before


def test_overwrite_keeps_the_old_run_until_the_new_one_can_begin(call, trained, tmp_path):
    """--overwrite with what cannot be trained leaves the old run as it was; a run may begin with its own generator."""
    run = copy_of(trained, tmp_path / "run")
    before = contents(run)
    for words in (("--way", 50), ("--start", "nowhere"), ("--workers", -1), ("--start", "omniglot")):
        refused(call("train", "quickstart", *TINY, "--run-dir", run, "--overwrite", *words))
        assert contents(run) == before
    again = ("--run-dir", run, "--overwrite", "--start", run, "--learning-rate", 1e-9, "--ema", 0)
    assert call("train", "quickstart", *TINY, *again)[0] == 0
    (old, _), (new, config) = load(trained), load(run)
    assert config.start == str(run) and all(abs(new[name] - old[name]).max() < 1e-6 for name in old)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(call, tmp_path):
    """A folder that cannot be written to is named."""
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(call("train", "quickstart", *TINY, "--run-dir", "locked/run"), "locked", "Permission denied")


def test_a_reader_that_has_seen_enough():
    """`mini-ht presets | head -1` ends without a word, whether lines are written at once or all in the end."""
    for command, unbuffered in itertools.product(([], ["presets"]), ("", "1")):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "wb") as pipe:
            words, env = [sys.executable, "-m", "mini_ht", *command], os.environ | {"PYTHONUNBUFFERED": unbuffered}
            ended = subprocess.run(words, env=env, stdout=pipe, stderr=subprocess.PIPE)
        assert ended.returncode == 141 and ended.stderr == b""
