"""Sphinx: ``make docs`` builds the site into build/docs, with warnings as errors."""

import re
import sys
from pathlib import Path

from bayeslora._version import __version__

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import run_tutorial  # noqa: E402

project = "bayeslora"
author = "the bayeslora authors"
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"bayeslora {release}"
html_show_sphinx = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True


def readme() -> str:
    """The README as a page of ``docs/``: its links as they are seen from here, and none to files outside."""
    text = (HERE.parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\[([^]]+)\]\((?!https?:|docs/)[^)]+\)", r"\1", text)
    return text.replace("](docs/", "](")


def read_source(app, page, content) -> None:
    """The first page begins with the README, and the tutorial holds what its code prints."""
    if page == "index":
        content[0] = readme() + "\n" + content[0]
    elif page == "tutorial":
        content[0] = run_tutorial.executed(content[0], HERE / "tutorial")


def setup(app) -> None:
    app.connect("source-read", read_source)
