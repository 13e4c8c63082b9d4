"""How Sphinx builds the documentation: ``nox -s docs``."""

from importlib.metadata import version as installed_version
from pathlib import Path

project = "commgraph"
author = "the commgraph developers"
copyright = author
version = release = installed_version("commgraph")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_search_scorer = str(Path(__file__).with_name("scorer.js"))
html_title = f"commgraph {version}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings name things between single backticks; those that are documented become links.
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as one list: autodoc documents properties and attrs fields by themselves
