"""How `make docs` builds the documentation: the pages of this folder, and an API reference from the docstrings."""

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

project = "SelfAlign"
author = "SelfAlign maintainers"
copyright = author
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"SelfAlign {release}"

autosummary_generate = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Generated from msg/ and srv/ by the build, documented on a page of their own.
autodoc_mock_imports = ["selfalign"]
napoleon_google_docstring, napoleon_numpy_docstring = True, False
myst_heading_anchors = 3
# The pages link to files of the repository that are no pages of the site.
suppress_warnings = ["myst.xref_missing"]


def setup(app: Any) -> None:
    """Have napoleon take what stands before the first colon of an attribute's docstring for words, not for a type."""

    def begin_with_empty_comment(
        app: Any, what: str, name: str, value: object, options: object, lines: list[str]
    ) -> None:
        if what in ("attribute", "data", "property"):
            lines[:0] = ["..", ""]

    app.connect("autodoc-process-docstring", begin_with_empty_comment, priority=499)
