"""The site: `make docs` builds it offline into docs/_build/html, and every warning is an error."""

import os
import re
import types
from pathlib import Path
from typing import Any

import jmeta
import jmeta.rl
import jmeta.search

project = "jmeta"
author = "The jmeta authors"
copyright = author
version = release = jmeta.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "myst_nb"]
exclude_patterns = ["_build", "notebooks/.ipynb_checkpoints"]
html_theme = "sphinx_book_theme"
html_title = "jmeta"
html_static_path = ["_static"]
html_css_files = ["jmeta.css"]
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navbar_persistent": [],
}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks show the outputs that they hold; the tests run them
copybutton_exclude = ".linenos, .gp, .go"

default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 120

# What is not jmeta's are shapes, as in Float[Array, "ways * shots"], and types of other libraries, which intersphinx
# finds; the offline build goes without.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!jmeta\.).*"), (r"py:.*", r"jmeta\.estimators\..*Estimator")]  # a type variable
if os.environ.get("JMETA_DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
    }


def undocumented() -> list[str]:
    """The public names that no page of docs/api/ describes."""
    pages = "\n".join(page.read_text() for page in (Path(__file__).parent / "api").glob("*.md"))
    described = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)$", pages, re.MULTILINE))
    return [
        f"{module.__name__}.{name}"
        for module in (jmeta, jmeta.rl, jmeta.search)
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
        if not {f"{module.__name__}.{name}", f"jmeta.{name}"} & described
    ]


def _signature(app: Any, what: str, name: str, thing: Any, options: Any, signature: str, result: str) -> Any:
    """As it is written: arrays and functions have their names, and what every Linen module or protocol takes goes."""
    if not signature:
        return None
    for pattern, text in (
        (r"^\(\*args, \*\*kwargs\)$", ""),
        (r"jaxlib\._jax\.Array", "Array"),
        (r"<function (\w+)>", r"\1"),
        (r"= (<.*?>|FrozenDict.*\))(?=, \w+:|\)$)", "= ..."),
        (r", parent: .*\)$", ")"),
    ):
        signature = re.sub(pattern, text, signature)
    return signature, result and result.replace("jaxlib._jax.Array", "Array")


def _public(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Where a type is described: `jmeta.core.Task` as `jmeta.Task`."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    for place in (jmeta, jmeta.rl, jmeta.search):
        if module.startswith("jmeta.") and getattr(getattr(place, name, None), "__module__", None) == module:
            target = f"{place.__name__}.{name}"
            return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, text)
    return None


def _docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """The words that open a paragraph stand out, and an argument "K." is no list from K on."""
    for pattern, text in ((r"^((?:Reference|Differences)[^:]*:)(?= )", r"**\1**"), (r"(?<=: )([A-Z]\.)$", r"\\\1")):
        lines[:] = [re.sub(pattern, text, line) for line in lines]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    from sphinx.util import logging

    def check(app: Any) -> None:
        for name in undocumented():
            logging.getLogger(__name__).warning("%s is public, but no page of docs/api/ describes it", name)

    app.connect("builder-inited", check)
    app.connect("missing-reference", _public)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon
