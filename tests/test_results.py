"""The scripts behind the results page run, in a small version."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mini_ht import Config, InputError, preset

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


def test_rows_are_commands(tmp_path):
    """A row's name says what is trained, and a mistyped one is refused."""
    rows = load(ROOT / "results/omniglot/rows.py", tmp_path)
    time = rows.TIMES["1"]
    assert rows.training("1shot-8ch-logits") == ["train", "omniglot-20way-1shot-8ch-logits", *time]
    more = ["--split", "alphabet", "--seed", "1"]
    assert rows.training("1shot-64ch-all-alphabet-seed1") == ["train", "omniglot-20way-1shot-64ch", *time, *more]
    some = ["train", "omniglot-20way-1shot-4ch", *rows.LENGTHS["quick"], "--generate", "last2"]
    assert rows.training("1shot-4ch-last2-quick") == some
    start = ["--start", "runs/omniglot/1shot-4ch-all-quick", "--learning-rate", "0.001"]
    assert rows.training("5shot-4ch-all-quick") == ["train", "omniglot-20way-5shot-4ch", *rows.LENGTHS["quick"], *start]
    brief = ["--episodes", "10240", "--workers", "1", "--start", "runs/omniglot/1shot-32ch-logits-quick", *rows.RATE]
    assert rows.training("5shot-32ch-logits-brief")[2:] == brief
    assert rows.training("1shot-32ch-logits-brief")[2:] == rows.LENGTHS["brief"]
    longer = ["--minutes", "130", "--workers", "1", "--seed", "1", "--start", "runs/omniglot/1shot-8ch-logits-seed1"]
    assert rows.training("1shot-8ch-logits-long-seed1")[2:] == longer
    longer = [*rows.LENGTHS["longer"], "--start", "runs/omniglot/1shot-8ch-logits-long"]
    assert rows.training("1shot-8ch-logits-longer")[2:] == longer
    more = ["--start", "runs/omniglot/1shot-8ch-logits-long", *rows.RATE]
    assert rows.training("5shot-8ch-logits-long")[2:] == [*rows.TIMES["5"], *more]
    longer = [*rows.LENGTHS["more"], "--start", "runs/omniglot/1shot-8ch-logits"]
    assert rows.training("1shot-8ch-logits-more")[2:] == longer
    upright = ["train", "omniglot-20way-5shot-4ch", *rows.UPRIGHT_TIMES["5"], *rows.UPRIGHT]
    upright += ["--start", "runs/omniglot/5shot-4ch-all"]
    assert rows.training("5shot-4ch-all-upright") == upright
    upright = [*rows.UPRIGHT_TIMES["1"], *rows.UPRIGHT, "--seed", "1"]
    upright += ["--start", "runs/omniglot/1shot-8ch-logits-long-seed1"]
    assert rows.training("1shot-8ch-logits-long-upright-seed1")[2:] == upright
    turned = [*time, "--turned", "1"]
    assert rows.training("1shot-8ch-all-turned")[2:] == turned
    start = ["--start", "runs/omniglot/1shot-8ch-all-turned", *rows.RATE]
    assert rows.training("5shot-8ch-all-turned")[2:] == [*rows.TIMES["5"], *turned[-2:], *start]
    strided = [*rows.STRIDED_TIMES["1"], *rows.STRIDED, *turned[-2:], *rows.STRIDED_RATE]
    assert rows.training("1shot-8ch-logits-strided")[2:] == strided
    wide = [*rows.LENGTHS["hour"], *rows.WIDE, "--seed", "1", "--start", "runs/omniglot/1shot-8ch-logits-wide-seed1"]
    assert rows.training("1shot-8ch-logits-wide-hour-seed1")[2:] == wide
    hours = [*rows.LENGTHS["hours"], "--seed", "2", "--start", "runs/omniglot/1shot-8ch-logits-hour"]
    assert rows.training("1shot-8ch-logits-hours")[2:] == hours
    hours = [*rows.LENGTHS["hours"], "--seed", "3", "--start", "runs/omniglot/1shot-8ch-logits-hour-seed1"]
    assert rows.training("1shot-8ch-logits-hours-seed1")[2:] == hours
    assert "--seed" not in rows.training("5shot-8ch-logits-hours")
    start = ["--start", "runs/omniglot/1shot-8ch-logits-quick-seed1"]
    blurred = [*rows.LENGTHS["hour"], *rows.BLURRED, "--seed", "3", *start]
    assert rows.training("1shot-8ch-logits-quick-blurred-seed1")[2:] == blurred
    with pytest.raises(InputError, match=r"only pooled convs can go on blurred"):
        rows.training("1shot-8ch-logits-strided-blurred")
    blurred = [*rows.LENGTHS["hour"], *rows.BLURRED, "--seed", "4", "--start", "runs/omniglot/1shot-8ch-logits-hours"]
    assert rows.training("1shot-8ch-logits-hours-blurred")[2:] == blurred
    start = ["--start", "runs/omniglot/1shot-8ch-logits-hours-blurred", *rows.RATE]
    assert rows.training("5shot-8ch-logits-hours-blurred")[2:] == [*rows.TIMES["5"], *rows.BLURRED, *start]
    twice = [*rows.LENGTHS["twice"], "--seed", "2", "--start", "runs/omniglot/1shot-48ch-logits-quick"]
    assert rows.training("1shot-48ch-logits-twice")[2:] == twice
    twice = ["--episodes", "10240", "--workers", "1", "--start", "runs/omniglot/1shot-48ch-logits-twice", *rows.RATE]
    assert rows.training("5shot-48ch-logits-twice")[2:] == twice
    few = ["--episodes", "20480", "--workers", "1", *rows.WIDE]
    for length, before in (("brief", "quick"), ("twice", "twice")):
        start = ["--start", f"runs/omniglot/1shot-48ch-logits-wide-{before}", *rows.RATE]
        five = ["--episodes", "5120", "--workers", "1", *rows.WIDE, *start]
        assert rows.training(f"5shot-48ch-logits-wide-{length}")[2:] == five
    twice = [*few, "--seed", "2", "--start", "runs/omniglot/1shot-48ch-logits-wide-quick"]
    assert rows.training("1shot-48ch-logits-wide-twice")[2:] == twice
    means = ["train", "omniglot-20way-5shot-4ch", *rows.LENGTHS["steady"], "--discriminant", "16"]
    means += ["--shared-features", "0", "--seed", "6", "--start", "runs/omniglot/5shot-4ch-all-discriminant-quick"]
    assert rows.training("5shot-4ch-all-discriminant-steady") == means
    assert rows.training("1shot-6ch-all-wide-quick") == ["train", "omniglot-20way-1shot-6ch", *few]
    wrong = (
        "1shot-8ch 2shot-8ch-all 1shot-7ch-all 1shot-8ch-all-quick-turned 1shot-8ch-all-seed1-quick ../1shot-8ch-all "
    )
    wrong += "1shot-8ch-all-upright-quick"
    for name in wrong.split():
        with pytest.raises(InputError):
            rows.training(name)


@needs_omniglot
def test_a_row_whose_start_is_missing(tmp_path, monkeypatch, capfd):
    """A row that begins with another one says so where that is not trained, without a traceback."""
    rows = load(ROOT / "results/omniglot/rows.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "argv", ["rows.py", "run", "1shot-4ch-logits-long", "--data-dir", str(OMNIGLOT)])
    with pytest.raises(SystemExit) as ended:
        rows.main()
    text = capfd.readouterr().err
    assert ended.value.code == 2 and "no checkpoint runs/omniglot/1shot-4ch-logits" in text and "Traceback" not in text
    assert not (tmp_path / "1shot-4ch-logits-long").exists()


def test_the_table_of_rows_is_in_the_documents(tmp_path):
    """docs/results.md has the table as the script prints it from the folders; each was trained as its command says."""
    rows = load(ROOT / "results/omniglot/rows.py", tmp_path)
    rows.HERE = ROOT / "results/omniglot"
    assert rows.table() in (ROOT / "docs/results.md").read_text()
    for folder in sorted(rows.HERE.glob("*/")):
        _, name, *options = rows.training(folder.name)
        assert f"mini-ht train {name} {' '.join(options)} " in (folder / "command.txt").read_text()
        kept = json.loads((folder / "summary.json").read_text())["config"]
        config = dataclasses.asdict(Config.from_json(json.dumps(kept)))
        wanted = dataclasses.asdict(preset(name))
        flags = [option for option in options if option.startswith("--no-")]
        wanted |= {flag.removeprefix("--no-"): False for flag in flags}
        options = [option for option in options if option not in flags]
        for option, value in zip(options[::2], options[1::2], strict=True):
            if (field := option[2:].replace("-", "_")) not in ("workers", "start"):
                wanted[field] = type(wanted[field])(value)
        assert config | {"start": ""} == wanted


def test_the_best_rows_and_their_figure(tmp_path, monkeypatch):
    """Both come from the folders, docs/results.md has the first; training counts that before, and 40 classes twice."""
    monkeypatch.syspath_prepend(ROOT / "results/omniglot")
    figure = load(ROOT / "results/omniglot/figure.py", tmp_path)
    figure.draw(tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    figure.draw_small(tmp_path / "small.png")
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")
    best, rows = figure.best, figure.rows
    assert best.table() in (ROOT / "docs/results.md").read_text()
    assert best.training_episodes("1shot-8ch-logits-hour") == 136_880 + 240_192
    wide = rows.kept_summary("1shot-8ch-logits-wide")["episodes"]
    assert best.training_episodes("1shot-8ch-logits-wide") == 2 * wide
    found = best.best(shot=1, generate="logits", split="random")
    assert set(found) >= {4, 8, 16} and figure.accuracy(found[8]) >= 91.54
    alike = [row for row in rows.found_rows() if re.match(r"1shot-8ch-logits(?!.*alphabet)", row)]
    assert found[8] in alike and figure.accuracy(found[8]) == max(map(figure.accuracy, alike))
    assert best.best(shot=1, split="alphabet")[8].startswith("1shot-8ch-logits-quick-alphabet")


@needs_omniglot
def test_a_row_is_trained_measured_and_checked(tmp_path, monkeypatch, capsys):
    """Few episodes: its folder has what the table needs, a second run agrees with it, and a wrong figure is noticed."""
    rows = load(ROOT / "results/omniglot/rows.py", tmp_path)
    monkeypatch.setitem(rows.LENGTHS, "quick", ["--episodes", "32", "--workers", "1"])
    monkeypatch.setattr(rows, "EPISODES", "8")
    monkeypatch.setattr(rows, "WAYS", rows.WAYS[::3])
    row, data = "1shot-4ch-logits-quick", str(OMNIGLOT)
    rows.run(row, data, tmp_path / "run")
    assert {file.name for file in (tmp_path / row).iterdir()} == {*rows.KEPT, "evaluate.jsonl", "command.txt"}
    assert rows.kept_machine(row) == rows.machine() and rows.machine().endswith(("float32", "bfloat16"))
    assert f"| {rows.kept_machine(row)}, 1 |" in rows.table().splitlines()[2]
    kept = [json.loads(text) for text in (tmp_path / row / "evaluate.jsonl").read_text().splitlines()]
    assert [(figures["protocol"], figures["norm"]) for figures in kept] == rows.WAYS
    assert rows.percent(kept[1]) in rows.table().splitlines()[2] and "| 32 |" in rows.table()
    rows.measure_views(row, data, tmp_path / "run")
    seen = [json.loads(text) for text in (tmp_path / row / "views.jsonl").read_text().splitlines()]
    assert [figures["views"] for figures in kept + seen] == [1, 1, 9, 9, 9, 9]
    assert [figures["query_views"] for figures in kept + seen] == [1, 1, 1, 1, 9, 9]
    assert kept[0]["accuracy"] != seen[0]["accuracy"] and rows.percent(seen[3]) in rows.table().splitlines()[2]
    with monkeypatch.context() as patch:  # measured again elsewhere, it says where it was trained
        patch.setattr(rows, "machine", lambda: "another")
        rows.run(row, data, tmp_path / "run")
    assert rows.kept_machine(row) == rows.machine()
    monkeypatch.setattr(rows, "train", lambda row, data_dir, run_dir: shutil.copytree(tmp_path / "run", run_dir))
    assert rows.check(row, data).startswith("reproduced")
    kept[0]["accuracy"] += 0.5
    (tmp_path / row / "evaluate.jsonl").write_text(json.dumps(kept[0]))
    with pytest.raises(SystemExit, match="not reproduced"):
        rows.check(row, data)
