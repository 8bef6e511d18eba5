"""The documentation site builds without a warning and needs no network to be read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("index", "api", "results", "pretrained", "scale", "reproducible", "architecture", "kernels", "tutorials/index")
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.py"))
LOADS = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]+)\"|<link\b[^>]*\bhref=\"([^\"]+)\"")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as HTML, with the code of the tutorials rendered and not run; tests/test_tutorials.py runs it."""
    # Built from copies, as the gallery is written beside its sources, and links between pages lead to where files are.
    folder = tmp_path_factory.mktemp("docs")
    for name in ("tutorials", "mini_ht", "results"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "ARCHITECTURE.md", folder)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    sources = folder / "docs"
    shutil.copytree(
        ROOT / "docs", sources, ignore=shutil.ignore_patterns("_build", "tutorials", "sg_execution_times.rst")
    )
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-D", "plot_gallery=0"]
    done = subprocess.run([*command, sources, folder / "site"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / "site"


def test_every_page_is_there(site):
    """All pages and one for each tutorial, which can be had as a notebook, too."""
    for page in (*PAGES, *(f"tutorials/{file.stem}" for file in TUTORIALS)):
        assert (site / f"{page}.html").exists(), page
    assert {file.stem for file in site.rglob("*.ipynb")} == {file.stem for file in TUTORIALS}


def test_pages_lead_to_each_other(site):
    """A link between pages is one on the site, from an included page, too."""
    for page, target in (("results", "recipe.html#views"), ("architecture", "recipe.html#blurred-pools")):
        assert f'href="{target}"' in (site / f"{page}.html").read_text(), page


def test_pages_load_nothing_from_elsewhere(site):
    """Scripts, styles and pictures lie in the site itself, and the check sees those that do not."""
    assert LOADS.findall('<script async src="https://a/b.js">') == [("https://a/b.js", "")]
    for file in site.rglob("*.html"):
        for found in LOADS.findall(file.read_text()):
            target = "".join(found)
            assert not re.match(r"(https?:)?//", target), f"{file.name} loads {target}"
            if not target.startswith(("data:", "#")):
                assert (file.parent / target.partition("?")[0]).exists(), (file.name, target)


def test_formulas_are_drawn_by_the_browser(site):
    """Formulas arrive as MathML: none is left as LaTeX."""
    for file in TUTORIALS:
        written = len(re.findall(r"\.\. math::|:math:`", file.read_text()))
        html = (site / "tutorials" / f"{file.stem}.html").read_text()
        assert html.count("<math ") == written and "\\frac" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.S), file


def test_notebooks_fold_solutions(site):
    """In a notebook, too, each solution waits to be unfolded."""
    for file in site.rglob("*.ipynb"):
        text = "".join("".join(cell["source"]) for cell in json.loads(file.read_text())["cells"])
        assert text.count("<summary>Solution</summary>") == (ROOT / "tutorials" / f"{file.stem}.py").read_text().count(
            ".. dropdown:: Solution"
        ), file.name
        assert ".. dropdown::" not in text
