"""Sphinx settings; what they need beyond Sphinx itself is in ``extension.py``."""

import sys
from pathlib import Path

import sdebench

sys.path.append(str(Path(__file__).parent))

project = "sdebench"
author = copyright = "The sdebench developers"
version = release = sdebench.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "extension",
]
default_role = "py:obj"

html_theme = "furo"
html_title = f"sdebench {version}"
html_static_path = ["_static"]
html_css_files = ["sdebench.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 2
# The notebook is stored with its outputs; the tests run its cells.
nb_execution_mode = "off"
nb_render_markdown_format = "gfm"
# Widgets are the only thing that would be fetched from elsewhere.
nb_ipywidgets_js = {}

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say shapes, which annotations cannot
