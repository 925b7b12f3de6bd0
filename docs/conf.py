"""The site: text pages whose cells are executed at each build, and an API reference in an order made by hand.

``python -m sphinx -W --keep-going -b html docs docs/_build/html`` builds it, without a network.
"""

import dataclasses
import importlib
import os
import re
import tempfile
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.util.nodes import make_refnode

import pyro_lvm

project = "pyro_lvm"
author = "the pyro_lvm authors"
release = version = pyro_lvm.__version__
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True  # a name that leads nowhere is a warning, and warnings are errors

html_theme = "furo"
html_title = "pyro_lvm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"  # drawn by the browser: no script, and nothing from a network
pygments_style, pygments_dark_style = "default", "monokai"

# ---------------------------------------------------------------- cells

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 120  # seconds a cell
nb_output_stderr = "remove-warn"  # what a page does not say on purpose is an error
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# A kernel shows a `Figure` only once pyplot has been loaded in it; pages make figures without pyplot.
_IPYTHON = tempfile.TemporaryDirectory(prefix="ipython-")  # gone when the build ends
_PROFILE = Path(_IPYTHON.name) / "profile_default"
_PROFILE.mkdir()
(_PROFILE / "ipython_kernel_config.py").write_text(
    """
c.IPKernelApp.log_level = "ERROR"
c.InteractiveShellApp.matplotlib = "inline"
c.InlineBackend.figure_formats = {"retina"}
c.InteractiveShellApp.exec_lines = ["import warnings", "warnings.filterwarnings('ignore', 'IProgress not found')"]
""",
    encoding="utf-8",
)
os.environ["IPYTHONDIR"] = os.environ["MPLCONFIGDIR"] = _IPYTHON.name  # not the settings of who builds
importlib.import_module("matplotlib.font_manager")  # lists the fonts, once for all kernels
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums are added up in one order

# ---------------------------------------------------------------- the reference

default_role = "py:obj"
add_module_names = False
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 90
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Annotations name torch, Pyro and the standard library, whose inventories would have to be downloaded, and some types
# of the package that nobody has to make.
_ELSEWHERE = r"(torch|pyro|numpy|collections|typing|pathlib|os|matplotlib|pandas|xarray|nn)\..*|Figure|Axes|Engine"
_INNER = r"pyro_lvm\.(guides\.(base|discrete|hierarchical|mixture)|models\.density|table|tracing|transforms)\..*"
nitpick_ignore_regex = [("py:.*", _ELSEWHERE), ("py:class", _INNER)]
nitpick_ignore = [("py:obj", name) for name in ("AutoNormal", "Delta", "SVI")]  # of Pyro


def _math(translator, node: nodes.math | nodes.math_block) -> None:
    """MathML of a formula; a display may be wider than a phone, and then scrolls by itself."""
    block = isinstance(node, nodes.math_block)
    formula = re.sub(r"\{(?:aligned|split)\}", "{align*}", node.astext())  # which the converter knows
    markup = latex2mathml.converter.convert(formula, display="block" if block else "inline")
    markup = re.sub(r"<mi>([a-z]{2,})</mi>", r'<mo lspace="0.17em" rspace="0.17em">\1</mo>', markup)  # log w, not logw
    translator.body.append(f'<div class="math">{markup}</div>' if block else markup)
    raise nodes.SkipNode


def _by_last_name(app, env, node, contnode):
    """A docstring says `fit` or `guides.refine`: the public name that ends so; of an attribute, its class."""
    if node.get("refdomain") != "py":
        return None
    objects = {name: entry for name, entry in env.domains["py"].objects.items() if not entry.aliased}
    target = node["reftarget"].removeprefix("pyro_lvm.")
    for wanted in (target, target.rpartition(".")[0]):
        found = sorted((name for name in objects if f".{name}".endswith(f".{wanted}")), key=len) if wanted else []
        if found and (len(found) == 1 or found[0] == f"pyro_lvm.{wanted}"):
            entry = objects[found[0]]
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, found[0])
    return None


def _whole(docstring: GoogleDocstring) -> tuple[str, list[str]]:
    """A property says what it is; Napoleon would take what stands before a colon for a type."""
    return "", docstring._consume_to_end()


def _no_constructor(app, what, name, obj, options, signature, returns):
    """Records are what functions return: they have attributes, and nobody calls the class."""
    is_record = dataclasses.is_dataclass(obj) and "Attributes:" in (obj.__doc__ or "") and "Args:" not in obj.__doc__
    return ("", None) if what == "class" and is_record else None


def _no_lists(app, what, name, obj, options, lines) -> None:
    """What a parameter is may be one letter, "K.", which would begin a list."""
    lines[:] = [re.sub(r"^((?::\w+ [^:]+:)? *)([A-Za-z]\.)(?= |$)", r"\1\\\2", line) for line in lines]


def setup(app) -> None:
    GoogleDocstring._consume_inline_attribute = _whole
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))
    app.connect("missing-reference", _by_last_name)
    app.connect("autodoc-process-signature", _no_constructor)
    app.connect("autodoc-process-docstring", _no_lists)
