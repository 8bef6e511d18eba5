"""Tutorials run, keep their form, use the whole model; their exercises can fail and can be solved."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_structure import MODEL, MODULES, TREES

FOLDER = Path(__file__).parents[1] / "tutorials"
TUTORIALS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
NAMES = [file.stem for file in TUTORIALS]
SECONDS = 60
ALL_SECONDS = 360  # on one core
TITLE = re.compile(r'r?"""\n\d\d \S.*\n=+\n')
PARTS = ("**What you will do.**", "**What you will learn.**", "**What you need.**")
EXERCISE = re.compile(r"^\*\*\d\. ", re.M)
SOLUTION = re.compile(r"^\.\. dropdown:: Solution\n\n((?:(?:   .*)?\n)+)", re.M)
# What a reader of the model meets: its own modules, what draws and stores it, and the constructions.
TAUGHT = (*MODEL, "parameters", "constructions")
# The steps inside `save` and `load`, which the tutorials use.
INNER = {"write_tensors", "read_tensors"}


def prose(file: Path) -> str:
    """The text of all cells, without the comment signs."""
    lines = file.read_text().splitlines()
    return "\n".join(line[2:] if line.startswith("# ") else "" for line in lines if not line.startswith("# %%")) + "\n"


def exercises(file: Path) -> Path:
    """The exercise file of a tutorial."""
    return FOLDER / "exercises" / f"exercise_{file.name[:2]}.py"


def solutions(file: Path) -> list[str]:
    """The code that a tutorial folds away."""
    found = [textwrap.dedent(block) for block in SOLUTION.findall(prose(file))]
    return [textwrap.dedent(block.partition(".. code-block:: python\n")[2]) for block in found]


def run(file: Path, size: str, seconds: float) -> float:
    """Run a tutorial as a reader would, on one core and without a screen; its CPU seconds."""
    environment = os.environ | {"MPLBACKEND": "agg", "TUTORIAL_SIZE": size, "OMP_NUM_THREADS": "1"}
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-W", "error", str(file)], capture_output=True, text=True, env=environment, timeout=seconds
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


taken: dict[str, float] = {}


@pytest.mark.alone
@pytest.mark.parametrize("file", TUTORIALS, ids=NAMES)
def test_a_tutorial_runs(file):
    """In test size a tutorial runs without a warning, its claims hold, and it takes under a minute of one core."""
    taken[file.stem] = run(file, "small", 10 * SECONDS)
    assert taken[file.stem] <= SECONDS, taken


@pytest.mark.alone
def test_all_tutorials_fit_an_afternoon():
    """In test size they take six minutes of one core together."""
    if len(taken) < len(TUTORIALS):
        pytest.skip("counts only when all have just run")
    assert sum(taken.values()) <= ALL_SECONDS, taken


@pytest.mark.full
@pytest.mark.parametrize("file", TUTORIALS, ids=NAMES)
def test_a_tutorial_runs_at_full_size(file):
    """At full size, too, its claims hold."""
    run(file, "full", 3600)


def test_numbers_are_complete():
    """Tutorials are numbered 01 to 11, and each has a file of exercises."""
    assert [name[:2] for name in NAMES] == [f"{number:02}" for number in range(1, 12)]
    assert [exercises(file).exists() for file in TUTORIALS] == [True] * len(TUTORIALS)
    assert len(list((FOLDER / "exercises").glob("*.py"))) == len(TUTORIALS)


@pytest.mark.parametrize("file", TUTORIALS, ids=NAMES)
def test_a_tutorial_keeps_its_form(file):
    """It opens with what one does, learns and needs, asserts, draws by a named function, ends with exercises."""
    text, tree = file.read_text(), ast.parse(file.read_text())
    assert TITLE.match(text) and all(part in (ast.get_docstring(tree) or "") for part in PARTS)
    assert any(isinstance(node, ast.Assert) for node in tree.body)
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert any(name.startswith("draw_") and name != "draw_parameters" for name in calls)
    last = prose(file).rpartition("\nExercises\n")[2]
    assert len(EXERCISE.findall(last)) in (2, 3) and len(SOLUTION.findall(last)) == len(EXERCISE.findall(last))
    assert len(solutions(file)) == len(EXERCISE.findall(last))


def solved(file: Path) -> str:
    """The exercise file of a tutorial, its solutions in place of the stubs; each stub has a solution and a checker."""
    tree, answers = ast.parse(exercises(file).read_text()), ast.parse("\n\n".join(solutions(file)))
    there = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    stubs = {node.name for node in there if "NotImplementedError" in ast.unparse(node)}
    written = {node.name for node in answers.body if isinstance(node, ast.FunctionDef)}
    assert stubs and stubs <= written and sum(node.name.startswith("test_") for node in there) >= len(stubs)
    tree.body = [node for node in tree.body if getattr(node, "name", None) not in written] + answers.body
    return ast.unparse(tree)


def check_exercises(files: list[Path], report: Path) -> dict[str, list[str]]:
    """Run exercise files as a reader would, in one go; for each of them what its checkers say, "" where they agree."""
    settings = ["-c", str(FOLDER.parent / "pyproject.toml"), "-p", "no:cacheprovider", "-m", "exercise"]
    settings += ["--rootdir", str(files[0].parent), f"--junitxml={report}"]  # the report's names begin at the root
    command = [sys.executable, "-m", "pytest", *settings, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent, timeout=600)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    said: dict[str, list[str]] = {file.stem: [] for file in files}
    for case in ElementTree.parse(report).iter("testcase"):
        problems = [problem.get("message") or problem.tag for problem in case]
        said[case.attrib["classname"].rpartition(".")[2]].append("; ".join(problems))
    return said


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What the checkers of all exercises say of the stubs, and of the tutorials' solutions."""
    folder = tmp_path_factory.mktemp("solved")
    for file in TUTORIALS:
        (folder / exercises(file).name).write_text(solved(file))
    before = check_exercises([exercises(file) for file in TUTORIALS], folder / "stubs.xml")
    return before, check_exercises([folder / exercises(file).name for file in TUTORIALS], folder / "solutions.xml")


@pytest.mark.parametrize("file", TUTORIALS, ids=NAMES)
def test_exercises_fail_until_solved(file, checked):
    """Every checker refuses the stubs and accepts the tutorial's solutions."""
    refused, accepted = (said[exercises(file).stem] for said in checked)
    assert len(refused) == len(accepted) > 0, checked
    assert all("NotImplementedError" in problem for problem in refused), refused
    assert not any(accepted), accepted


def public(module: str) -> set[str]:
    """Functions and classes of a module that are for others."""
    body = TREES[f"mini_ht.{module}"].body
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")}


def used(tree: ast.AST) -> set[str]:
    """Names that code calls or mentions, imports aside."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_public_function_is_taught():
    """Every public function and class of the model appears in the code of at least one tutorial."""
    taught = set().union(*(used(ast.parse(file.read_text())) for file in TUTORIALS))
    missing = {f"{module}.{name}" for module in TAUGHT for name in public(module) - INNER - taught}
    assert not missing, f"{len(missing)} are in no tutorial: {', '.join(sorted(missing))}"
    assert len(MODULES) and used(ast.parse("import a\nb.c(d)")) == {"b", "c", "d"}
