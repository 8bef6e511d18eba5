"""The documentation site: tutorials executed by sphinx-gallery, pages from Markdown, mathematics as MathML."""

import ctypes
import os
import re
from pathlib import Path

# Before anything imports numpy, torch or triton.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from latex2mathml.converter import convert
from sphinx_gallery.sorting import FileNameSortKey

import mini_ht

project, author, version = "mini_ht", "the mini_ht contributors", mini_ht.__version__
extensions = [
    *("sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"),
    *("myst_parser", "sphinx_design", "sphinx_gallery.gen_gallery"),
]
# The gallery's table of run times wants a style sheet from the network.
exclude_patterns = ["_build", "**sg_execution_times.rst"]
html_theme = "furo"
html_title = "mini_ht"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings give shapes, which say more
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]  # the sort key below is a class, which the cache cannot hold
sphinx_gallery_conf = {
    "examples_dirs": "../tutorials",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"/\d\d_",
    "ignore_pattern": "exercise",
    "within_subsection_order": FileNameSortKey,
    "doc_module": ("mini_ht",),
    "reference_url": {"mini_ht": None},
    "show_memory": False,
    "show_signature": False,
    "abort_on_example_error": True,
    "image_scrapers": ("matplotlib",),
}

FOLDED = re.compile(r"\.\. dropdown:: ([^\n]*)\n\n(```.*?\n```\n)", re.S)
INCLUDE = re.compile(r"```\{include\} (\S+)\n```\n")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]*)\)")


def mathml(latex: str, display: str) -> str:
    """A formula that browsers draw by themselves: no script, no font, no network."""
    if "\\\\" in latex or "&" in latex:
        latex = rf"\begin{{align}}{latex}\end{{align}}"
    return convert(latex, display=display)


def visit_inline(self, node):
    """Write a formula inside a line, in place of docutils' own way."""
    from docutils.nodes import SkipNode

    self.body.append(mathml(node.astext(), "inline"))
    raise SkipNode


def visit_block(self, node):
    """Write a formula on lines of its own."""
    from docutils.nodes import SkipNode

    self.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise SkipNode


def keep_links_inside(app, name, source):
    """Markdown pages also live in the repository: what they link to there and not here becomes plain text."""
    page = Path(app.env.doc2path(name))
    folder = page.parent
    if page.suffix != ".md":
        return
    if include := INCLUDE.fullmatch(source[0]):
        page = (page.parent / include[1]).resolve()
        source[0] = page.read_text()

    def plain(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, mark, place = target.partition("#")
        file = (page.parent / path).resolve()
        if image:
            return match[0]
        if file.is_relative_to(app.srcdir):  # an included page lies elsewhere than the page that includes it
            return f"[{text}]({os.path.relpath(file, folder)}{mark}{place})"
        return f"`{text}`" if "." in text and "`" not in text else text

    source[0] = LINK.sub(plain, source[0])


def fold_solutions(app, error):
    """Fold solutions away in the notebooks, too."""
    import json

    for file in [] if error else Path(app.outdir).rglob("*.ipynb"):
        notebook = json.loads(file.read_text())
        for cell in notebook["cells"]:
            text = FOLDED.sub(r"<details><summary>\1</summary>\n\n\2\n</details>\n", "".join(cell["source"]))
            cell["source"] = text.splitlines(keepends=True)
        file.write_text(json.dumps(notebook, indent=1))


def setup(app):
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("source-read", keep_links_inside)
    app.connect("build-finished", fold_solutions)
