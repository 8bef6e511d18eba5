"""The scripts behind the results page run, in a small version."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
OMNIGLOT = Path(os.environ.get("MINI_HT_OMNIGLOT", ROOT / "../shared/data/omniglot")).resolve()


needs_omniglot = pytest.mark.skipif(
    not OMNIGLOT.is_dir(), reason="no Omniglot archives; name their folder in MINI_HT_OMNIGLOT"
)


def load(file: Path, folder: Path) -> ModuleType:
    """A script as a module, from a copy in `folder`, as it writes beside itself."""
    spec = importlib.util.spec_from_file_location(file.parent.name, shutil.copy(file, folder))
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@needs_omniglot
def test_support_norm(tmp_path, monkeypatch):
    """One task, few episodes: the rows have every figure of the committed ones, and learned statistics help."""
    file = ROOT / "results/support-norm/measure.py"
    script = load(file, tmp_path)
    monkeypatch.setattr(script, "TASKS", ((2, 1),))
    monkeypatch.setattr(sys, "argv", ["measure.py", "--data-dir", str(OMNIGLOT), "--episodes", "32"])
    threads = torch.get_num_threads()
    with torch.enable_grad():  # the script turns gradients off
        script.main()
    torch.set_num_threads(threads)
    rows, committed = (json.loads((place / "validation.json").read_text()) for place in (tmp_path, file.parent))
    assert rows[0].keys() == committed[0].keys()
    found = {row["statistics"]: row for row in rows}
    assert list(found) == list(dict.fromkeys(row["statistics"] for row in committed))
    assert found["support"]["gain"] == 0 and found["shrunk 0.9"]["gain"] > 0.05
    assert max(found["shrunk 0.9"]["loss"], found["company"]["loss"]) < found["support"]["loss"]


@needs_omniglot
def test_unlabelled_embeddings(tmp_path, monkeypatch, capsys):
    """Few episodes and two settings: the summary has every figure of the committed one, and the same settings win."""
    file = ROOT / "results/unlabelled-embeddings/measure.py"
    committed = json.loads(file.with_name("summary.json").read_text())
    script = load(file, tmp_path)
    monkeypatch.setattr(script, "CHOOSING", 16)
    monkeypatch.setattr(script, "GRID", [tuple(setting) for setting in committed["settings"].values()])
    monkeypatch.setattr(sys, "argv", ["measure.py", "--data-dir", str(OMNIGLOT), "--episodes", "24"])
    script.main()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() == committed.keys() and summary["settings"] == committed["settings"]
    assert summary["gain"]["accuracy"] > 0.01 and summary["oracle"]["accuracy"] > summary["two_layers"]["accuracy"]
    assert json.loads(capsys.readouterr().out) == summary
