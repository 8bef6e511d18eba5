"""The scripts behind the results page run, in a small version."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OMNIGLOT = Path(os.environ.get("MINI_HT_OMNIGLOT", ROOT / "../shared/data/omniglot")).resolve()


@pytest.mark.skipif(not OMNIGLOT.is_dir(), reason="no Omniglot archives; name their folder in MINI_HT_OMNIGLOT")
def test_unlabelled_embeddings(tmp_path, monkeypatch, capsys):
    """Few episodes and two settings: the summary has every figure of the committed one, and the same settings win."""
    file = ROOT / "results/unlabelled-embeddings/measure.py"
    committed = json.loads(file.with_name("summary.json").read_text())
    spec = importlib.util.spec_from_file_location("measure", shutil.copy(file, tmp_path))  # writes beside itself
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "CHOOSING", 16)
    monkeypatch.setattr(script, "GRID", [tuple(setting) for setting in committed["settings"].values()])
    monkeypatch.setattr(sys, "argv", ["measure.py", "--data-dir", str(OMNIGLOT), "--episodes", "24"])
    script.main()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() == committed.keys() and summary["settings"] == committed["settings"]
    assert summary["gain"]["accuracy"] > 0.01 and summary["oracle"]["accuracy"] > summary["two_layers"]["accuracy"]
    assert json.loads(capsys.readouterr().out) == summary
