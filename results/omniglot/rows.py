"""Rows of the Omniglot table: trains and measures one, measures it with 9 views, prints the table, checks a row.

    python results/omniglot/rows.py run 1shot-8ch-logits --data-dir ../shared/data/omniglot
    python results/omniglot/rows.py views 1shot-8ch-logits --data-dir ../shared/data/omniglot
    python results/omniglot/rows.py check 1shot-8ch-logits-brief --data-dir ../shared/data/omniglot
    python results/omniglot/rows.py table

A row is named SHOTSshot-CHANNELSch-LAYERS, LAYERS being what is generated: all, lastK (the last K convs and the logits
layer) or logits. Behind that may stand, in this order:

- a recipe: wide (trained on tasks of 40 classes, half as many a step), discriminant (the last conv by 8 steps of
  attention among class means, 16 from twice on; 5 shots from the start), turned (the one that these presets had before:
  all episodes turned) or strided (the one before that);
- a length, in episodes, of 40 classes half as many: brief (20,480; with 5 shots 10,240 for the generator of the row
  quick), quick (40,960), twice (as many others for that of the row quick; with 5 shots 10,240 for that of the row
  twice), thrice (as many for that of twice) or steady (163,840 for that of quick, images moved by 1 pixel, not by 2);
- or in minutes: short (7.5 of two cores), hour (60 more of two cores for the generator of the row without that word),
  hours (95 more for that of hour, and other episodes), long (130 of one core in place of that hour), more (45 of two
  cores, the last quarter with classes neither turned nor mirrored) or longer (60 more of two cores for that of long);
- upright (16 more minutes of a core, all like that quarter, for that of the row without this word) or blurred (60 more
  of two cores, the features' pools blurred, for that of the row without this word, and other episodes; with 5 shots the
  length before it, for the generator of the row blurred of 1 shot);
- alphabet (Lake's split) and seedS.

Other rows of 5 shots begin with the generator for one shot, trained before. A run goes on where it was stopped; what is
measured is kept in a folder of the row's name beside this file.
"""

import argparse
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mini_ht import Config, InputError, preset
from mini_ht.parameters import generator_size
from mini_ht.plan import cnn_size
from mini_ht.training.workers import storage_dtype

HERE = Path(__file__).parent
NAME = re.compile(
    r"(1|5)shot-(\d+)ch-(all|last\d|logits)(?:-(wide|turned|strided|discriminant))?"
    r"(?:-(brief|quick|twice|thrice|steady|short|hours|hour|longer|long|more))?(-upright|-blurred)?(-alphabet)?(-seed\d+)?"
)
TIMES = {"1": ["--minutes", "32", "--workers", "2"], "5": ["--minutes", "20", "--workers", "1"]}  # by shots
FEW = ["--episodes", "10240", "--workers", "1"]
LENGTHS = {
    "brief": ["--episodes", "20480", "--workers", "1"],  # counted in episodes, a row can be repeated
    "5shot-brief": FEW,  # more than the row quick of 1 shot has had
    "5shot-twice": FEW,  # more than the row twice of 1 shot has had
    "quick": ["--episodes", "40960", "--workers", "1"],
    "twice": ["--episodes", "40960", "--workers", "1"],  # more than quick has had
    "thrice": ["--episodes", "40960", "--workers", "2", "--learning-rate", "0.002", "--decay", "1"],  # and than twice
    "steady": ["--episodes", "163840", "--workers", "1", "--decay", "1", "--shift", "1"],  # and than quick
    "short": ["--minutes", "7.5", "--workers", "2"],
    "hour": ["--minutes", "60", "--workers", "2"],  # more than the row without this word has had
    "long": ["--minutes", "130", "--workers", "1"],  # the same
    "hours": ["--minutes", "95", "--workers", "2"],  # and more than hour
    "longer": ["--minutes", "60", "--workers", "2", "--learning-rate", "0.002", "--decay", "1"],  # and more than long
    "more": "--minutes 45 --workers 2 --learning-rate 0.002 --decay 0 --ema 0.9995 --upright 0.25".split(),
}
EARLIER = dict.fromkeys(("hour", "long", "more"), "")  # with which a row begins, in place of its own word
EARLIER |= {"twice": "-quick", "thrice": "-twice", "steady": "-quick", "hours": "-hour", "longer": "-long"}
OTHER = {"hours": 2, "twice": 2, "thrice": 4, "steady": 6}  # added to the seed, for other episodes
RATE = ["--learning-rate", "0.001"]  # of what is trained already
UPRIGHT_TIMES = {"1": ["--minutes", "8", "--workers", "2"], "5": ["--minutes", "16", "--workers", "1"]}
UPRIGHT = ["--learning-rate", "0.002", "--decay", "1", "--no-rotate", "--no-mirror"]
BLURRED = ["--shared-convs", "blurred"]
WIDE = ["--way", "40", "--episodes-per-step", "8"]  # as many images in a step
STRIDED = ["--shared-convs", "strided", "--decay", "1"]
STRIDED_TIMES = TIMES | {"1": ["--minutes", "60", "--workers", "1"]}
STRIDED_RATE = ["--learning-rate", "0.002"]
RUNS = Path("runs/omniglot")
EPISODES = "1000"
WAYS = [("disjoint", "batch"), ("disjoint", "support"), ("released", "batch"), ("released", "support")]
VIEWS = "9"
KEPT = ("summary.json", "metrics.jsonl", "curve.png", "machine.txt")
AGAIN = 0.015  # how far a repeated row may lie from the first, beside both intervals: processors round differently
PAPER = {  # 20-way, table 1 of arXiv 2201.04182: logits layer generated; MAML++ after Antoniou et al.
    1: {8: "87.2, 81.4", 16: "93.7, 88.6", 32: "95.5, 95.6", 48: "95.7, 95.8", 64: "96.2, 97.7"},
    5: {8: "94.7, 83.2", 16: "98.0, 94.9", 32: "98.6, 98.6", 48: "98.8, 98.8", 64: "98.8, 99.3"},
}
COLUMNS = [
    "row",
    *map(", ".join, WAYS),
    *(f"{', '.join(way)}, {VIEWS} views{more}" for more in ("", ", queries too") for way in WAYS[:2]),
    "episodes",
    "minutes",
    "machine, processes",
    "generator, CNN",
    "paper: HT, MAML++",
]


def training(row: str) -> list[str]:
    """The command that trains a row, behind `mini-ht`; without data and run folder. InputError for another name."""
    if not (found := NAME.fullmatch(row)):
        raise InputError(f"{row!r} is no row; wanted a name such as 1shot-8ch-logits or 5shot-16ch-all-alphabet-seed1")
    shot, channels, layers, recipe, length, ending, alphabet, seed = found.groups()
    name = f"omniglot-20way-{shot}shot-{channels}ch" + ("-logits" if layers == "logits" else "")
    preset(name)
    strided, alone = recipe == "strided", shot == "1" or recipe == "discriminant"  # alone: not from a row of 1 shot
    longer = length in EARLIER and alone
    if strided and ending == "-blurred":
        raise InputError(f"{row!r} is no row: only pooled convs can go on blurred; leave out one of the two words")
    usual = (STRIDED_TIMES if strided else TIMES)[shot]
    if length in ("brief", "quick", "twice", "short") or longer:
        usual = LENGTHS[length] if alone else LENGTHS.get(f"{shot}shot-{length}", LENGTHS[length])
    more = [*usual, *(STRIDED if strided else [])]
    if recipe == "wide" and more[0] == "--episodes":
        more[1] = str(int(more[1]) // 2)  # as many images
    upright, blurred = ending == "-upright", ending == "-blurred" and shot == "1"
    if upright:
        more = [*UPRIGHT_TIMES[shot], *UPRIGHT, *(STRIDED[:2] if strided else [])]
    if ending == "-blurred":
        more = [*(LENGTHS["hour"] if blurred else more), *BLURRED]
    more += WIDE if recipe == "wide" else []
    more += ["--discriminant", "16" if longer else "8", "--shared-features", "0"] if recipe == "discriminant" else []
    more += ["--turned", "1"] if recipe in ("turned", "strided") else []
    more += ["--generate", layers] if layers.startswith("last") else []
    more += ["--split", "alphabet"] if alphabet else []
    number = int(seed[5:]) if seed else 0
    number += OTHER.get(length, 0) * longer + 2 * blurred
    more += ["--seed", str(number)] if number else []
    if upright or blurred:
        return ["train", name, *more, "--start", str(RUNS / row.replace(ending, ""))]
    more += STRIDED_RATE if strided and shot == "1" else []
    more += ["--start", str(RUNS / row.replace(f"-{length}", EARLIER[length]))] if longer else []
    more += [] if alone else ["--start", str(RUNS / f"1shot{row[5:]}".replace("-brief", "-quick")), *RATE]
    return ["train", name, *more]


def mini_ht(*arguments: str, quiet: bool = False) -> str:
    """Run a command of mini-ht; returns what it prints if quiet."""
    command = [sys.executable, "-m", "mini_ht", *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if quiet else None).stdout or ""


def machine() -> str:
    """What trains here: the GPU, or the processor and the instructions that torch uses, and how numbers are stored."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stored = str(storage_dtype(Config(), device)).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {stored}"
    about = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", about.read_text()) if about.exists() else None
    name = re.sub(r"\(R\)|\(TM\)| Processor", "", named[1]) if named else platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {stored}"


def train(row: str, data_dir: str, run_dir: Path) -> None:
    """Train a row, or go on with it; the run folder says on what machine it began."""
    more = ["--resume"] if (run_dir / "training.safetensors").exists() else []
    if not more:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "machine.txt").write_text(machine() + "\n")
    mini_ht(*training(row), "--data-dir", data_dir, "--run-dir", str(run_dir), *more)


def measure(
    run_dir: Path, data_dir: str, protocol: str, norm: str, views: str = "1", query_views: str = "1"
) -> dict[str, Any]:
    """Figures of a trained row on episodes of 20 test characters."""
    options = ["--data-dir", data_dir, "--protocol", protocol, "--norm", norm, "--way", "20"]
    options += ["--views", views, "--query-views", query_views]
    return json.loads(mini_ht("evaluate", str(run_dir), *options, "--episodes", EPISODES, "--json", quiet=True))


def run(row: str, data_dir: str, run_dir: Path) -> None:
    """Train and measure a row, and keep what is small."""
    train(row, data_dir, run_dir)
    figures = [measure(run_dir, data_dir, *way) for way in WAYS]
    folder = HERE / row
    folder.mkdir(exist_ok=True)
    for name in KEPT:
        shutil.copy(run_dir / name, folder)
    write_lines(folder / "evaluate.jsonl", figures)
    (folder / "command.txt").write_text(f"mini-ht {shlex.join(training(row))} --data-dir DIR --run-dir RUN\n")


def measure_views(row: str, data_dir: str, run_dir: Path) -> None:
    """Measure a trained row where the generator sees each support image at 9 places, then the CNN each query, too."""
    figures = [measure(run_dir, data_dir, *way, VIEWS, queries) for queries in ("1", VIEWS) for way in WAYS[:2]]
    write_lines(HERE / row / "views.jsonl", figures)


def write_lines(file: Path, figures: Iterable[dict[str, Any]]) -> None:
    """One line of JSON for each measurement."""
    file.write_text("".join(json.dumps(line) + "\n" for line in figures))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """What `write_lines` wrote; nothing where there is no such file."""
    return [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []


def kept_figures(row: str) -> list[dict[str, Any]]:
    """A row's figures, by `WAYS`; the first is disjoint and norm batch."""
    return read_lines(HERE / row / "evaluate.jsonl")


def check(row: str, data_dir: str) -> str:
    """Train a row anew and compare it with what is kept; SystemExit if the two differ."""
    kept = kept_figures(row)[0]
    with tempfile.TemporaryDirectory() as folder:
        train(row, data_dir, Path(folder) / "run")
        again = measure(Path(folder) / "run", data_dir, *WAYS[0])
    allowed = kept["interval"] + again["interval"] + AGAIN
    text = f"{row} has {percent(again)} %, kept are {percent(kept)} %; up to {100 * allowed:.2f} points may lie between"
    text += f"; machine here: {machine()}, then: {kept_machine(row)}"
    if abs(again["accuracy"] - kept["accuracy"]) > allowed:
        raise SystemExit(f"not reproduced: {text}")
    return f"reproduced: {text}"


def percent(figures: dict[str, Any]) -> str:
    """An accuracy with its interval."""
    return f"{100 * figures['accuracy']:.2f} +- {100 * figures['interval']:.2f}"


def cells(texts: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(texts)} |"


def found_rows() -> list[str]:
    """The rows that were measured, by number."""
    found = [path.parent.name for path in HERE.glob("*/evaluate.jsonl")]
    return sorted(found, key=lambda row: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", row)])


def kept_summary(row: str) -> dict[str, Any]:
    """What training a row took, and its config."""
    return json.loads((HERE / row / "summary.json").read_text())


def kept_machine(row: str) -> str:
    """What trained a row: processor, instructions, numbers."""
    return (HERE / row / "machine.txt").read_text().strip()


def line(row: str) -> str:
    """A row of the table."""
    figures = [percent(one) for one in kept_figures(row)]
    views = [percent(one) for one in read_lines(HERE / row / "views.jsonl")]
    views += [""] * (4 - len(views))
    summary = kept_summary(row)
    config = Config.from_json(json.dumps(summary["config"]))
    published = PAPER[config.shot].get(config.channels, "") if config.generate == "logits" else ""
    command = training(row)
    where = f"{kept_machine(row)}, {command[command.index('--workers') + 1]}"
    cost = f"{summary['episodes']:,}", f"{summary['seconds'] / 60:.1f}", where
    sizes = f"{generator_size(config):,}, {cnn_size(config):,}"
    return cells([f"[{row}](../results/omniglot/{row})", *figures, *views, *cost, sizes, published])


def table() -> str:
    """All rows that are there, as Markdown for docs/results.md."""
    return "\n".join([cells(COLUMNS), cells(["---"] * len(COLUMNS)), *map(line, found_rows())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "views", "check", "table"))
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--data-dir", help="folder with the two Omniglot archives")
    options = parser.parse_args()
    if options.what == "table":
        print(table())
        return
    if not options.rows or not options.data_dir:
        parser.error(f"{options.what} needs --data-dir and at least one ROW")
    try:
        for row in options.rows:
            training(row)
    except InputError as error:
        parser.error(str(error))
    try:
        for row in options.rows:
            if options.what == "run":
                run(row, options.data_dir, RUNS / row)
            elif options.what == "views":
                measure_views(row, options.data_dir, RUNS / row)
            else:
                print(check(row, options.data_dir))
    except subprocess.CalledProcessError as error:  # the command has said why
        raise SystemExit(error.returncode) from None


if __name__ == "__main__":
    main()
