"""The documentation site: `make docs` builds it into build/docs, without a network and without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "extensions"), str(ROOT)]

import torch  # noqa: E402

import drift_kernels  # noqa: E402

project = "drift_kernels"
author = "The drift_kernels authors"
version = release = drift_kernels.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "code_names",
    "commands",
    "mathml",
    "parameter_types",
    "repository",
]
exclude_patterns = ["extensions"]

# Where the repository's files can be read, as "https://HOST/OWNER/NAME/blob/main/{path}". Links to files that the site
# does not have lead there; without it they are plain text.
repository_file = None

# Files outside docs that are pages of the site, and the folders whose page they are.
repository_pages = {
    "CHANGELOG.md": "site/changelog.md",
    "CONTRIBUTING.md": "site/contributing.md",
    "benchmarks": "site/benchmarks.md",
    "benchmarks/README.md": "site/benchmarks.md",
    "examples/digit_sums": "site/digit_sums.md",
    "examples/digit_sums/README.md": "site/digit_sums.md",
}

# Markdown
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
smartquotes = False
highlight_language = "none"  # of blocks that do not say theirs: commands, formulas, output
suppress_warnings = ["myst.header"]  # parts of the README begin with their own, lower headings

# The interface
default_role = "name"  # code_names.py
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # parameter_types.py
# Trainers, and libraries that only their integrations import: the pages are the same with and without them.
autodoc_mock_imports = [
    *("axolotl", "lightning", "llamafactory", "omegaconf", "peft", "pydantic", "torchtitan", "transformers", "tyro"),
    "yaml",
]
swift = {
    "swift": {},
    "swift.callbacks": {"TrainerCallback": type("TrainerCallback", (), {}), "callbacks_map": {}},
    "swift.optimizers": {"OptimizerCallback": type("OptimizerCallback", (), {}), "optimizers_map": {}},
}
for name, contents in swift.items():
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(contents)


def custom_op(name: str, **_: object) -> Callable[[Any], Any]:
    """In place of torch's, whose operators hide the signature and the docstring of their function."""

    def plain(function: Any) -> Any:
        function.register_fake = lambda fake: fake
        return function

    return plain


torch.library.custom_op = custom_op
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False
python_maximum_signature_line_length = 88
add_module_names = False
nitpicky = True
# Of other packages, whose pages are not looked up: a build needs no network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|transformers|lightning|peft|pydantic|argparse|collections|os|pathlib|typing)\..*"),
    (r"py:.*", r"(nn|TrainingArguments|TrainerState|TrainerControl|LightningModule|ModelSpec|StateDict)(\..*)?"),
    (
        r"py:.*",
        r"Tensor|Config|Trainer|Trainer\.Config|Path|Callable|Iterable|Iterator|Mapping|Sequence|ContextManager",
    ),
]

# The pages
html_theme = "furo"
html_math_renderer = "mathml"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}
copybutton_exclude = ".linenos, .gp, .go"
