"""The directive `drift-prior`: the command and its subcommands, from what argparse knows of them."""

from __future__ import annotations

import argparse
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from drift_kernels import cli
from drift_kernels.cli.arguments import EXIT_STATUS

_WIDTH = 88


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """Each subcommand's parser, by its name, in the order of `drift-prior --help`."""
    commands = argparse.ArgumentParser(prog="drift-prior").add_subparsers()
    for command in cli._COMMANDS:
        command.add(commands)
    return dict(commands.choices)


class DriftPrior(Directive):
    """A section for each subcommand: what it does, its usage, its options."""

    def run(self) -> list[nodes.Node]:
        return [nodes.paragraph("", EXIT_STATUS), *(_section(name, parser) for name, parser in subcommands().items())]


def _section(name: str, parser: argparse.ArgumentParser) -> nodes.section:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=_WIDTH)
    what = (parser.description or "").removeprefix(f"{name}: ")
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    section = nodes.section(ids=[nodes.make_id(name)], names=[name])
    section += nodes.title("", "", nodes.literal("", name))
    section += nodes.paragraph("", f"{what[:1].upper()}{what[1:]}.")
    section += nodes.literal_block(usage, usage, language="none")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if actions:
            if group.title not in ("options", "positional arguments"):
                section += nodes.paragraph("", "", nodes.strong("", str(group.title)))
            section += nodes.definition_list("", *map(_entry, actions))
    return section


def _entry(action: argparse.Action) -> nodes.definition_list_item:
    value = "" if action.nargs == 0 else argparse.HelpFormatter("")._format_args(action, _value_of(action))
    names = action.option_strings or [value]
    terms = [f"{name} {value}".strip() if action.option_strings else name for name in names]
    item = nodes.definition_list_item("", nodes.term("", "", nodes.literal("", ", ".join(terms))))
    text = (action.help or "") % {**vars(action), "prog": ""}
    if action.required and action.option_strings:
        text += " (required)"
    item += nodes.definition("", nodes.paragraph("", text))
    return item


def _value_of(action: argparse.Action) -> str:
    return action.dest.upper() if action.option_strings else action.dest


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("drift-prior", DriftPrior)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
