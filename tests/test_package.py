"""The package as a stranger gets it: a wheel, in an environment of its own, without extras."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("mini_ht", "kernels", "pyproject.toml", "README.md", "LICENSE")
IMPORT_SECONDS = 0.2
ABSENT = ("torch", "triton", "onnx", "onnxruntime", "tyro", "tqdm", "matplotlib")

SCRIPT = """
import importlib.util, sys
import mini_ht
from mini_ht.datasets import glyphs
absent, folder = sys.argv[1].split(), sys.argv[2]
assert folder not in mini_ht.__file__ and "site-packages" in mini_ht.__file__
assert not [name for name in absent if importlib.util.find_spec(name)]
parameters, config = mini_ht.load_pretrained("omniglot")
mini_ht.save(folder, parameters, config)
parameters, config = mini_ht.load(folder)
images = 255 - glyphs(seed=78, classes=3, drawings=2, size=40).pixels[..., 0]
labels = ["a", "a", "b", "b", "c", "c"]
classifier = mini_ht.HyperTransformerClassifier(checkpoint=(parameters, config)).fit(images, labels)
classifier.export(f"{folder}/c.npz")
again = mini_ht.load_classifier(f"{folder}/c.npz")
print(classifier.predict(images).tolist() == again.predict(images).tolist(), classifier.score(images, labels))
"""
TIMER = "import time; start = time.process_time(); import mini_ht; print(time.process_time() - start)"


def run(*words: object, **options: Any) -> str:
    """Stdout of a command that must succeed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=900, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*words: object) -> None:
    """Run pip, or skip where it reaches no registry."""
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, timeout=900)
    if "No matching distribution" in done.stderr or "NewConnectionError" in done.stderr:
        pytest.skip("the packages that it needs cannot be fetched")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        skip = shutil.ignore_patterns("__pycache__")
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name, **({"ignore": skip} if copy is shutil.copytree else {}))
    pip("wheel", "--quiet", "--no-deps", "-w", folder / "dist", folder)
    (found,) = (folder / "dist").iterdir()
    return found


@pytest.fixture(scope="module")
def python(wheel: Path) -> Path:
    """The interpreter of a fresh environment with the wheel in it and what it needs, no more."""
    home = wheel.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", home)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip("--python", python, "install", "--quiet", wheel)
    return python


def stranger() -> dict[str, str]:
    """The environment variables of somebody who does not work on the sources."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.mark.slow
def test_wheel_holds_what_is_needed(wheel):
    """Every source file, the pretrained generators and the demo's page are in the wheel."""
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(file.relative_to(ROOT)) for file in (ROOT / "mini_ht").rglob("*") if file.suffix in (".py", ".html")}
    wanted |= {f"mini_ht/{file.relative_to(ROOT)}" for file in (ROOT / "kernels").glob("*.py")}
    wanted |= {str(file.relative_to(ROOT)) for file in (ROOT / "mini_ht/pretrained").glob("*.safetensors")}
    assert wanted <= names, sorted(wanted - names)


@pytest.mark.slow
def test_no_extras_are_needed_to_classify(python, tmp_path):
    """Without extras a checkpoint is loaded and saved, and a classifier fitted, exported and read back."""
    out = run(python, "-c", SCRIPT, " ".join(ABSENT), tmp_path, cwd=tmp_path, env=stranger())
    assert out.split()[0] == "True" and 0.9 <= float(out.split()[1]) <= 1


@pytest.mark.slow
def test_the_command_says_what_it_lacks(python, tmp_path):
    """`mini-ht` without extras names what to install."""
    done = subprocess.run([python.with_name("mini-ht")], capture_output=True, text=True, cwd=tmp_path, env=stranger())
    assert done.returncode == 1 and "pip install 'mini_ht[train]'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.alone
def test_import_is_quick(python, tmp_path):
    """`import mini_ht` takes at most 0.2 s of CPU time; the best of five, so that a busy machine does not count."""
    seconds = [float(run(python, "-c", TIMER, cwd=tmp_path, env=stranger())) for _ in range(5)]
    assert min(seconds) <= IMPORT_SECONDS, seconds
