"""Sphinx configuration; `make docs` builds the pages into docs/_build, offline."""

import os
import sys
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import generate  # noqa: E402 (what is beside this file)

project = "scvae"
author = "the scvae developers"
copyright = f"2026, {author}"
version = release = installed_version("scvae-pyro")

extensions = [
    "myst_nb",
    "sphinx-mathjax-offline",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates", "fragments"]

# Pages that are made of what the repository holds already: tutorials, results, options, commands, messages.
generate.pages()
generate.resolve_options()

nb_execution_mode = os.environ.get("SCVAE_DOCS_NOTEBOOKS", "off")  # they keep their outputs; `make docs-all` runs them
nb_execution_in_temp = True  # where nothing of the repository is, and what they write is removed
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "attrs_inline", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
always_use_bars_union = True
typehints_defaults = "braces-after"
typehints_formatter = generate.typed
typehints_document_rtype_none = False
autodoc_inherit_docstrings = False  # of torch
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Links to other documentation need only the names in references.txt; with SCVAE_DOCS_ONLINE=1 whole inventories are
# fetched.
online = os.environ.get("SCVAE_DOCS_ONLINE") or os.environ.get("READTHEDOCS")
intersphinx_mapping = {
    project: (address, None if online else str(inventory))
    for project, (address, inventory) in generate.inventories().items()
}

suppress_warnings = ["config.cache"]  # of the function that is an option of autodoc
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"pyro\..*|torch\.(distributions|optim)\..*"),  # whose inventories name them otherwise, or not at all
    (
        r"py:class",
        r"scvae\.(.*\._\w+|boundary\.(ranks|signals)\..*|data\.(order|tables)\..*|inference\.(recording|steps)\..*)",
    ),  # within
    (r"py:class", r"scvae\.modules\.(em\.EM|codebook\.UniformCodes)"),
    (r"py:(data|class)", r"(scvae\.boundary\.options\.)?(Whole|Positive|NonNegative|Fraction|Flag|Range)"),
]

html_theme = "sphinx_book_theme"
html_title = f"scvae {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {
    "repository_url": generate.REPOSITORY,
    "use_repository_button": True,
    "use_issues_button": True,
    "path_to_docs": "docs",
    "show_navbar_depth": 1,
    "navbar_persistent": [],
}

warnings.filterwarnings("ignore", module="sphinx_autodoc_typehints")  # of what Sphinx 10 takes away


kept = {}


def aside(_app, what, name, _object, _options, lines):
    """Keep the docstring of an attribute from napoleon, which takes the words before a colon for its type."""
    if what in ("attribute", "property") and not any(line.startswith("---") for line in lines):
        kept[name] = lines.copy()
        lines.clear()


def back(_app, _what, name, _object, _options, lines):
    """Put it back."""
    lines[:] = kept.pop(name, lines)


def link(_app, name, content):
    """Let links into the repository lead to where its files are pages, or to the repository."""
    page = DOCS / f"{name}.md"
    if page.exists():
        content[0] = generate.linked(content[0], page, page)


def setup(app):
    app.connect("autodoc-process-docstring", aside, priority=100)
    app.connect("autodoc-process-docstring", back, priority=900)
    app.connect("source-read", link)
