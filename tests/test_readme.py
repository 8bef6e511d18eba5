"""What the README and the cards tell a reader to type works as printed, with less time and fewer episodes."""

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from mini_ht import cli, load_pretrained
from mini_ht.cli import main
from mini_ht.training import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OMNIGLOT = Path(os.environ.get("MINI_HT_OMNIGLOT", ROOT / "../shared/data/omniglot")).resolve()


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_the_python_block_runs():
    """The ten lines of Python run without torch and give logits for every image and class."""
    (block,) = blocks("python")
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["logits"].shape == (20, 20) and np.isfinite(scope["logits"]).all()


def test_make_targets_exist():
    """Every make command in the README is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"train", "test"} <= named <= targets


@pytest.mark.parametrize("name", ["omniglot", "omniglot-any"])
def test_a_card_says_how_its_generator_was_trained(name, monkeypatch):
    """The card's command, with the options of then, makes the config that is in the file."""
    card = (ROOT / "docs/pretrained.md").read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    (line,) = re.findall(r"^\| trained by \|.*", card, re.M)
    command, *more = re.findall(r"`((?:mini-ht train|--).*?)`", line)
    commands: list[cli.Train] = []
    monkeypatch.setattr(cli, "train", commands.append)
    assert main(shlex.split(" ".join([command, *more]))[1:]) == 0
    (found,), (_, kept) = commands, load_pretrained(name)
    # Where convs are generated none learns at a rate of its own.
    assert found.config == dataclasses.replace(kept, conv_rate=found.config.conv_rate)


@pytest.mark.skipif(not OMNIGLOT.is_dir(), reason="no Omniglot archives; name their folder in MINI_HT_OMNIGLOT")
def test_the_omniglot_commands_run(tmp_path, monkeypatch, capsys):
    """The two commands on Omniglot train, resume from their own folder, and print the figures as JSON."""
    (block,) = [block for block in blocks("") if "mini-ht train" in block]
    commands = [shlex.split(line)[1:] for line in block.splitlines() if line.startswith("mini-ht")]
    small = {"--data-dir": str(OMNIGLOT), "--minutes": "0.05", "--episodes": "16"}
    assert small.keys() <= {word for command in commands for word in command}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINI_HT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(report, "EPISODES", 16)
    for command in commands:
        words = [small.get(flag, word) for flag, word in zip(["", *command], command, strict=False)]
        assert main(words) == 0, command
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["way"] == 20 and figures["episodes"] == 16 and 0 <= figures["accuracy"] <= 1
    assert (tmp_path / "runs/omniglot/episode.png").exists()
