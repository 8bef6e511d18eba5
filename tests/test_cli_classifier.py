"""The classifier's commands: folders of images in, small files out, and one sentence for whatever is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mini_ht import adapt_many as adapt_many_module
from mini_ht.classifier import HyperTransformerClassifier
from mini_ht.classifier_file import load_classifier
from mini_ht.cli import main
from mini_ht.datasets import glyphs
from mini_ht.errors import InputError
from mini_ht.files import write_atomically

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[1]
NAMES = ("alef", "bet", "gimel")


@pytest.fixture(scope="module")
def drawings():
    """[6, 4, 40, 40] uint8, ink 0 on 255."""
    return 255 - glyphs(seed=78, classes=6, drawings=4, size=40).pixels.reshape(6, 4, 40, 40)


@pytest.fixture
def call(capsys, tmp_path, monkeypatch, drawings):
    """call(words...) beside `support/` and `query.png` -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    write_support(tmp_path / "support", drawings)
    Image.fromarray(drawings[1, 3]).save("query.png")

    def run(*words):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # tyro's way
            code = stop.code
        return code, *capsys.readouterr()

    return run


def write_support(folder, drawings, shot=2, names=NAMES):
    for name, images in zip(names, drawings, strict=False):
        (folder / name).mkdir(parents=True)
        for number in range(shot):
            Image.fromarray(images[number]).save(folder / name / f"{number}.png")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(result, *words):
    """Exit code 2, nothing on stdout, on stderr one line that begins mini-ht: and has these words."""
    code, out, err = result
    assert code == 2 and not out and "Traceback" not in err, result
    line = err.strip("\n").splitlines()
    assert len(line) == 1 and line[0].startswith("mini-ht: "), err
    for word in words:
        assert word in line[0], err


# What works


@pytest.mark.parametrize("suffix", ["onnx", "npz"])
def test_adapt_predict_show(call, drawings, suffix):
    """From folders to a file, to a table and JSON of probabilities, and to what is in the file."""
    code, out, err = call("adapt", "omniglot", "support", "-o", f"c.{suffix}")
    assert code == 0 and not err and "3 classes from 6 images" in out and "difference" in out
    clf = HyperTransformerClassifier().fit(drawings[:3, :2].reshape(-1, 40, 40), np.repeat(NAMES, 2))
    wanted = clf.predict_proba(["query.png"])[0]
    code, out, _ = call("predict", f"c.{suffix}", "query.png", "--json")
    found = json.loads(out)["images"][0]
    assert code == 0 and found["image"] == "query.png" and found["class"] == clf.predict(["query.png"])[0]
    assert list(found["probabilities"]) == list(NAMES)
    assert list(found["probabilities"].values()) == pytest.approx(wanted, abs=1e-4)
    code, out, _ = call("predict", f"c.{suffix}", "query.png", "support/alef/0.png")
    assert code == 0 and len(out.splitlines()) == 2
    assert out.split()[:3] == ["query.png", found["class"], f"{100 * wanted.max():.1f}"]
    code, out, _ = call("show", f"c.{suffix}", "--picture", "k.png")
    assert code == 0 and "alef, bet, gimel" in out and "omniglot" in out and "3 x 3 x 8 x 8" in out
    with Image.open("k.png") as image:
        assert image.size[0] > 100
    shown = json.loads(call("show", f"c.{suffix}", "--json")[1])
    assert shown["classes"] == list(NAMES) and shown["numbers"] == 8 * 9 * 25 + 64 + 27
    assert shown["weights"] == clf.task_.provenance["weights"]


def test_usage(call):
    """The commands are in the usage, and each explains its options."""
    assert all(f"mini-ht {name}" in call()[1] for name in ("adapt ", "predict", "show", "adapt-many"))
    for name in ("adapt", "predict", "show", "adapt-many"):
        code, out, _ = call(name, "--help")
        assert code == 0 and "usage" in out


def test_unlabelled_photos_and_hidden_files(call, tmp_path, drawings):
    """`_unlabelled/` joins the support set and is no class; hidden files are left alone."""
    assert call("adapt", "omniglot", "support", "-o", "a.npz")[0] == 0
    (tmp_path / "support" / "alef" / ".note").write_text("mine")
    assert call("adapt", "omniglot", "support", "-o", "b.npz")[0] == 0
    (tmp_path / "support" / "_unlabelled").mkdir()
    Image.fromarray(drawings[1, 3]).save(tmp_path / "support" / "_unlabelled" / "x.png")
    code, out, _ = call("adapt", "omniglot", "support", "-o", "c.npz")
    assert code == 0 and "3 classes from 7 images" in out
    one, two, three = (tmp_path / f"{name}.npz" for name in "abc")
    assert one.read_bytes() == two.read_bytes() != three.read_bytes()
    assert load_classifier(three).classes_.tolist() == list(NAMES)
    assert load_classifier(three).provenance["support"] == "7 images, 1 unlabelled"


def test_duplicates_are_warned_of(call, tmp_path):
    """An image that lies in two classes is named on stderr, and the file is written."""
    shutil.copy(tmp_path / "support" / "alef" / "0.png", tmp_path / "support" / "bet" / "copy.png")
    code, _, err = call("adapt", "omniglot", "support", "-o", "c.npz")
    assert code == 0 and err.count("warning") == 1 and "alef/0.png" in err and "bet/copy.png" in err


def test_the_readme_commands_run(call, tmp_path, drawings):
    """What the README tells a reader to type works as printed."""
    (block,) = re.findall(r"^```\n(mini-ht adapt .*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    shutil.copytree(tmp_path / "support", tmp_path / "symbols")
    write_support(tmp_path / "tasks" / "one", drawings)
    Image.fromarray(drawings[0, 3]).save(tmp_path / "new.jpg")
    for line in block.splitlines():
        assert call(*shlex.split(line, comments=True)[1:])[0] == 0, line
    assert {"classifier.onnx", "kernels.png", "classifiers/one.onnx"} <= contents(tmp_path).keys()


def test_no_torch_is_imported():
    """adapt and predict start without torch and matplotlib, whose import would take seconds."""
    script = "import sys, mini_ht.cli_classifier, mini_ht.adaptation, mini_ht.support_folder, mini_ht.adapt_many; "
    script += "print(sorted({'torch', 'matplotlib', 'onnx', 'onnxruntime', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done


# Many tasks


@pytest.fixture
def many(tmp_path, drawings):
    """Five support folders of different sizes, the fourth of one class."""
    rng = np.random.default_rng(0)
    for number in range(5):
        order = rng.permutation(6)[: 1 if number == 3 else 2 + number]
        write_support(tmp_path / "many" / f"task{number}", drawings[order], 1 + number % 2, "abcdef")
    return tmp_path / "many"


@pytest.mark.parametrize("workers", [1, 2])
def test_adapt_many(call, tmp_path, many, workers, monkeypatch):
    """Every good folder gets the classifier that `adapt` writes for it; a bad one is named, with exit code 1."""
    monkeypatch.setattr(adapt_many_module, "BATCH", 2)
    code, out, err = call("adapt-many", "omniglot", many, "-o", "out", "--workers", workers)
    assert code == 1 and "4 written, 0 were there, 1 failed" in out
    assert err.count("mini-ht: ") == 1 and "task3: " in err and "1 class folders" in err
    assert sorted(contents(tmp_path / "out")) == [f"task{number}.onnx" for number in (0, 1, 2, 4)]
    for number in (0, 4):
        assert call("adapt", "omniglot", many / f"task{number}", "-o", f"{number}.onnx")[0] == 0
        assert (tmp_path / "out" / f"task{number}.onnx").read_bytes() == (tmp_path / f"{number}.onnx").read_bytes()


def test_adapt_many_writes_nothing_wrong(call, tmp_path, many, monkeypatch):
    """Where the file that is checked differs from NumPy, no file of its batch is put in place."""
    real = adapt_many_module.file_bytes

    def wrong(classifier, file, precision):
        arrays = {name: array + 0.5 for name, array in classifier.network.arrays.items()}
        network = dataclasses.replace(classifier.network, arrays=arrays)
        return real(dataclasses.replace(classifier, network=network), file, precision)

    monkeypatch.setattr(adapt_many_module, "file_bytes", wrong)
    code, out, err = call("adapt-many", "omniglot", many, "-o", "out", "--workers", 1)
    assert code == 1 and "0 written, 0 were there, 5 failed" in out and err.count("would differ from NumPy") == 4
    assert not contents(tmp_path / "out")


def test_adapt_many_goes_on(call, tmp_path, many, monkeypatch):
    """Stopped half way, it leaves whole files, and goes on with what is missing; --force starts again."""
    monkeypatch.setattr(adapt_many_module, "BATCH", 2)
    shutil.rmtree(many / "task3")

    def stop_after(count):
        left = iter(range(count))

        def some(*arguments, **options):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return write_atomically(*arguments, **options)

        return some

    with monkeypatch.context() as patch:
        patch.setattr(adapt_many_module, "write_atomically", stop_after(3))
        code, _, err = call("adapt-many", "omniglot", many, "-o", "out", "--format", "npz", "--workers", 1)
    assert code == 130 and "stopped" in err
    before = contents(tmp_path / "out")
    assert len(before) == 3 and before.keys() > {"task0.npz", "task1.npz"}  # of the others either may be first
    code, out, _ = call("adapt-many", "omniglot", many, "-o", "out", "--format", "npz", "--workers", 1)
    assert code == 0 and "1 written, 3 were there, 0 failed" in out
    assert contents(tmp_path / "out").items() > before.items()
    code, out, _ = call("adapt-many", "omniglot", many, "-o", "out", "--format", "npz", "--workers", 1, "--force")
    assert code == 0 and "4 written" in out
    code, out, _ = call("adapt-many", "omniglot", many, "-o", "out", "--format", "npz")
    assert code == 0 and "0 written, 4 were there" in out


def test_ranks_share_the_folders(call, tmp_path, many, monkeypatch):
    """Each of the ranks that torchrun starts writes classifiers of its own, and together they write all."""
    shutil.rmtree(many / "task3")
    assert call("adapt-many", "omniglot", many, "-o", "all", "--format", "npz", "--workers", 1)[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert call("adapt-many", "omniglot", many, "-o", f"rank{rank}", "--format", "npz")[0] == 0
        shares.append(contents(tmp_path / f"rank{rank}"))
    assert all(shares) and not shares[0].keys() & shares[1].keys()
    assert shares[0] | shares[1] == contents(tmp_path / "all")


def test_adapt_many_on_a_full_disk(call, tmp_path, many, monkeypatch):
    """A file that cannot be written is reported, and the others of its batch are there."""
    shutil.rmtree(many / "task3")

    def full(file, data):
        if file.stem == "task1":
            raise InputError(f"cannot write {file}: No space left on device")
        write_atomically(file, data)

    monkeypatch.setattr(adapt_many_module, "write_atomically", full)
    code, out, err = call("adapt-many", "omniglot", many, "-o", "out", "--workers", 1, "--precision", "int8")
    assert code == 1 and "3 written, 0 were there, 1 failed" in out
    assert err.count("mini-ht: ") == 1 and "task1: " in err and "No space left" in err
    assert sorted(contents(tmp_path / "out")) == ["task0.onnx", "task2.onnx", "task4.onnx"]


# Bad input


def one_class(folder):
    for name in NAMES[1:]:
        shutil.rmtree(folder / "support" / name)


def empty_class(folder):
    (folder / "support" / "empty").mkdir()


def text_file(folder):
    (folder / "support" / "bet" / "text.png").write_text("no image")


def animation(folder):
    frames = [Image.new("L", (20, 20), value) for value in (0, 255)]
    frames[0].save(folder / "support" / "bet" / "moving.gif", save_all=True, append_images=frames[1:])


def too_many(folder):
    for number in range(25):
        shutil.copytree(folder / "support" / "alef", folder / "support" / f"more{number}")


def blank(folder):
    Image.new("L", (50, 50), 255).save(folder / "support" / "bet" / "blank.png")


def nested(folder):
    (folder / "support" / "bet" / "deeper").mkdir()


def taken(folder):
    (folder / "c.onnx").write_text("mine")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (one_class, ("1 class folders", "2 .. 20")),
        (empty_class, ("no images in class folder", "empty")),
        (text_file, ("text.png", "not an image")),
        (animation, ("moving.gif", "2 frames")),
        (too_many, ("28 class folders", "2 .. 20", "take fewer")),
        (blank, ("blank.png", "no ink")),
        (nested, ("deeper", "not an image")),
        (taken, ("c.onnx is there", "--force")),
        (lambda folder: shutil.rmtree(folder / "support"), ("cannot list support",)),
    ],
)
def test_bad_support(call, tmp_path, spoil, words):
    """Each mistake in the support folder gets one line and exit code 2, and changes nothing on disk."""
    spoil(tmp_path)
    before = contents(tmp_path)
    refused(call("adapt", "omniglot", "support", "-o", "c.onnx"), *words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "words, contains",
    [
        (("adapt", "omniglott", "support", "-o", "d.onnx"), ("omniglott", "one of omniglot")),
        (("adapt", "omniglot", "support", "-o", "d.pt"), (".onnx or .npz",)),
        (("adapt", "omniglot", "support", "-o", "query.png/d.onnx"), ("query.png",)),
        (("predict", "c.npz"), ("no image was given",)),
        (("predict", "none.npz", "query.png"), ("cannot read none.npz",)),
        (("predict", "short.npz", "query.png"), ("short.npz is cut short",)),
        (("predict", "c.npz", "query.png", "none.png"), ("none.png",)),
        (("predict", "query.png", "query.png"), (".onnx or .npz",)),
        (("show", "short.npz"), ("short.npz is cut short",)),
        (("show", "c.npz", "--picture", "query.png"), ("query.png is there", "--force")),
        (("adapt-many", "omniglot", "none", "-o", "out"), ("cannot list none",)),
        (("adapt-many", "omniglot", "support/alef", "-o", "out"), ("no folders",)),
        (("adapt-many", "none", "support", "-o", "out"), ("no checkpoint none",)),
        (("adapt-many", "omniglot", "many", "-o", "out", "--workers", "-1"), ("workers is -1",)),
        (("adapt-many", "omniglot", "many", "-o", "query.png"), ("query.png is a file",)),
        (("predict", "c.npz", "none.png"), ("none.png", "No such file")),
        (("predict", "c.npz", "short.npz"), ("short.npz", "no known format")),
    ],
)
def test_bad_words(call, tmp_path, many, words, contains):
    """Files that are missing, damaged or of another kind get one line and exit code 2, and change nothing."""
    assert call("adapt", "omniglot", "support", "-o", "c.npz")[0] == 0
    (tmp_path / "short.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:-400])
    before = contents(tmp_path)
    refused(call(*words), *contains)
    assert contents(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(call, tmp_path):
    """A folder that cannot be written to is named."""
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(call("adapt", "omniglot", "support", "-o", "locked/c.npz"), "locked", "Permission denied")
