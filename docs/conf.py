"""The documentation's site: `make docs` builds it, a warning is an error, nothing is fetched."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import ssl_jax  # noqa: E402

project = "ssl_jax"
author = "ssl_jax authors"
release = ssl_jax.__version__
html_title = f"ssl_jax {release}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "config_keys",
]
html_theme = "furo"
# Blocks without a language are commands, and output.
highlight_language = "text"
# Single backticks in docstrings are code.
default_role = "code"

myst_heading_anchors = 3

napoleon_numpy_docstring = False
# "Attributes:" of a class as a list, not as members that are documented twice.
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
