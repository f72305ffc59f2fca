"""Sphinx configuration; `make docs` builds the pages into docs/_build."""

from importlib.metadata import version as installed_version

project = "scvae"
author = "the scvae developers"
copyright = f"2026, {author}"
version = release = installed_version("scvae-pyro")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links of the README that lead out of the documentation

autodoc_typehints = "none"  # the docstrings say what the arguments are
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"scvae {release}"
