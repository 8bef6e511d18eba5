"""The shape of the source: imports point one way, heavy packages stay out, files stay short, names are explained."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# A module imports only modules of lower rank, or of its own package.
LAYERS = (
    ("arrays", "errors"),
    ("files", "memory"),
    ("config",),
    ("plan",),
    ("kernels",),
    ("attention", "tokens", "features"),
    ("discriminant",),
    ("parameters", "presets", "constructions"),
    ("checks", "norms"),
    ("cnn",),
    ("generator",),
    ("views",),
    ("datasets",),
    ("ink", "folded"),
    ("task_classifier",),
    ("onnx_graph", "kernel_picture"),
    ("classifier_file",),
    ("export",),
    ("adaptation",),
    ("classifier", "support_folder"),
    ("adapt_many",),
    ("cli_classifier",),
    ("demo",),
    ("cli_demo",),
    ("episodes",),
    ("evaluation", "figures", "inspection"),
    ("maps",),
    ("training",),
    ("baselines", "bench"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ONLY = {"kernels": {"arrays", "errors"}, "datasets": {"errors", "files"}}
MODEL = ("arrays", "config", "plan", "attention", "tokens", "features", "norms", "cnn", "generator")
# Of a file every line counts; of the others those that are not blank.
LONGEST_FILE, MODEL_LINES, PACKAGE_LINES, KERNEL_LINES = 300, 700, 6300, 2150
HEAVY = ("torch", "tqdm", "matplotlib", "tyro", "tensorboard", "onnx", "onnxruntime", "sklearn")
MAY_IMPORT_HEAVY = (
    *("mini_ht.training.", "mini_ht.baselines.", "mini_ht.bench", "mini_ht.cli", "mini_ht.kernels.torch_conv"),
    *("mini_ht.kernels.triton_", "mini_ht.kernels.benchmark", "mini_ht.kernels.alternatives"),
    *("mini_ht.kernels.problems", "mini_ht.kernels.tune"),
)


def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything that is installed; `kernels/` is mini_ht.kernels."""
    found = {}
    for folder, package in ((ROOT / "mini_ht", "mini_ht"), (ROOT / "kernels", "mini_ht.kernels")):
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}
LINES = {name: sum(1 for line in file.read_text().splitlines() if line.strip()) for name, file in MODULES.items()}


def imports(tree: ast.AST, lazy: bool) -> set[str]:
    """Dotted names that are imported; without `lazy`, only those that run when the module is imported."""
    names: set[str] = set()
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write it in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return names


def part(name: str) -> str:
    """mini_ht.training.loop.train -> training; mini_ht itself -> the empty string."""
    return name.partition(".")[2].partition(".")[0]


def test_the_walk_sees_lazy_and_nested_imports():
    """The walk tells imports inside functions from the others, and finds those in try, if and class bodies."""
    tree = ast.parse(
        "import a\ntry:\n  from b import c\nexcept E:\n  pass\nclass D:\n  import e\n\ndef f():\n  import g"
    )
    assert imports(tree, lazy=False) == {"a", "b.c", "e"} and imports(tree, lazy=True) == {"a", "b.c", "e", "g"}
    assert part("mini_ht.training.loop.train") == "training" and part("mini_ht") == ""
    assert len(MODULES) > 25 and "mini_ht.kernels.block" in MODULES


@pytest.mark.parametrize("name", [name for name in MODULES if name != "mini_ht"])
def test_imports_point_one_way(name):
    """No module imports one of its own or a higher layer, inside functions neither; nothing imports cli."""
    mine = part(name)
    assert mine in RANK, f"{name} has no layer: add it to LAYERS"
    for other in sorted(imports(TREES[name], lazy=True)):
        if other.partition(".")[0] != "mini_ht" or part(other) == mine:
            continue
        theirs = part(other)
        assert theirs in RANK, f"{name} imports {other}, which has no layer"
        assert RANK[theirs] < RANK[mine], f"{name} (layer {RANK[mine]}) imports {other} (layer {RANK[theirs]})"
        assert theirs in ONLY.get(mine, {theirs}), f"{name} imports {other}; {mine} may import {ONLY.get(mine)}"


def test_nobody_imports_the_sources_folder():
    """The folder kernels/ is always imported as mini_ht.kernels."""
    for name, tree in TREES.items():
        assert not {other for other in imports(tree, lazy=True) if other.partition(".")[0] == "kernels"}, name


@pytest.mark.parametrize("name", MODULES)
def test_heavy_packages_are_imported_late(name):
    """Outside of training, bench, cli and torch's kernels nothing imports torch or its like; triton only its own."""
    heavy = {other.partition(".")[0] for other in imports(TREES[name], lazy=False)}
    assert "triton" not in heavy or name.startswith("mini_ht.kernels.triton_")
    if not name.startswith(MAY_IMPORT_HEAVY):
        assert not heavy & set(HEAVY), f"{name} imports {sorted(heavy & set(HEAVY))} at module level"


def sizes() -> tuple[int, int, int]:
    """Lines of the model, of all of `mini_ht/` with it, and of `kernels/`."""
    kernels = sum(count for name, count in LINES.items() if name.startswith("mini_ht.kernels"))
    return sum(LINES[f"mini_ht.{name}"] for name in MODEL), sum(LINES.values()) - kernels, kernels


def test_sizes():
    """Files by all their lines; model, package and kernels by those that are not blank: each within its budget."""
    counts = {name: len(file.read_text().splitlines()) for name, file in MODULES.items()}
    longest, (model, package, kernels) = max(counts, key=counts.__getitem__), sizes()
    found = f"longest file {longest} {counts[longest]}, model {model}, mini_ht {package}, kernels {kernels}"
    assert counts[longest] <= LONGEST_FILE and model <= MODEL_LINES, found
    assert package <= PACKAGE_LINES and kernels <= KERNEL_LINES, found


def undocumented(tree: ast.Module, where: str) -> list[str]:
    """Public functions, classes and methods without docstring, and the module itself if it has any code."""
    missing = [] if ast.get_docstring(tree) or not tree.body else [where]
    waiting = [(where, node) for node in tree.body]
    while waiting:
        prefix, node = waiting.pop()
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            missing.append(f"{prefix}.{node.name}")
        if isinstance(node, ast.ClassDef):
            waiting += [(f"{prefix}.{node.name}", child) for child in node.body]
    return sorted(missing)


def test_everything_public_is_explained():
    """Every public function, class and method has a docstring."""
    missing = [name for module, tree in TREES.items() for name in undocumented(tree, module)]
    # What autograd calls is documented by its class.
    missing = [name for name in missing if name.rpartition(".")[2] not in ("forward", "backward")]
    assert not missing, f"{len(missing)} without docstring: {', '.join(missing)}"
    example = ast.parse("def f(): pass\nclass A:\n  '''a'''\n  def g(self): pass")
    assert undocumented(example, "m") == ["m", "m.A.g", "m.f"]


INFERENCE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy}:
            raise ImportError("not installed: " + name)

sys.meta_path.insert(0, Refuse())
import numpy as np
import mini_ht

config = mini_ht.Config(way=2, channels=2, blocks=2, image_size=8, encoding=8, layers=1, shared_features=4)
parameters = mini_ht.draw_parameters(config, seed=0)
mini_ht.preset("quickstart")
support, query = np.random.default_rng(0).random((2, 4, 8, 8, 1), np.float32)
logits = mini_ht.generate(parameters, config, support, np.array([0, 0, 1, 1]))(query)
try:
    mini_ht.to_torch(parameters)
except ImportError:
    print(logits.shape, logits.dtype, np.isfinite(logits).all(), "torch" in sys.modules)
"""


def test_inference_needs_only_numpy():
    """Drawing, generating and classifying run where torch, tqdm, matplotlib, tyro and triton cannot be imported."""
    script = INFERENCE.replace("{heavy}", repr((*HEAVY, "triton")))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["(4,", "2)", "float32", "True", "False"], done


def test_the_map_is_true():
    """ARCHITECTURE.md lists every file that holds code, with its count of lines that are not blank, to within 15 %."""
    rows = re.findall(r"^\| \[(\S+\.py)\].*\| (\d+) \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.M)
    listed = {ROOT / file: int(count) for file, count in rows}
    wanted = {MODULES[name]: count for name, count in LINES.items() if MODULES[name].name != "__init__.py"}
    assert listed.keys() == wanted.keys(), listed.keys() ^ wanted.keys()
    wrong = {
        str(file): (listed[file], count) for file, count in wanted.items() if abs(listed[file] - count) > 0.15 * count
    }
    assert not wrong, f"(listed, found): {wrong}"


def test_readme_states_the_sizes():
    """The README's three line counts are those found, to within 5 %."""
    number = r"(\d[\d,]*)"
    found = re.search(rf"is {number} lines; all of\s+`mini_ht/`\s+is {number},\s+and `kernels/` is {number}", README)
    assert found, "the sentence on sizes is not in the README"
    for stated, counted in zip(found.groups(), sizes(), strict=True):
        assert abs(int(stated.replace(",", "")) - counted) <= 0.05 * counted
