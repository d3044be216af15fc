"""The directive `drift-prior`: the command and its subcommands, from what argparse knows of them."""

from __future__ import annotations

import argparse
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from drift_kernels.cli import command_line

_WIDTH = 88


def parts_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Each subcommand's parser, by its name, in the order of `drift-prior --help`."""
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(commands.choices)


class DriftPrior(Directive):
    """What the command does and its own options; then a section for each subcommand: what it does, usage, options."""

    def run(self) -> list[nodes.Node]:
        parser = command_line()
        sections = [_section(name, part) for name, part in parts_of(parser).items()]
        what, exit_status = (nodes.paragraph("", str(text)) for text in (parser.description, parser.epilog))
        return [what, *_options(parser), exit_status, *sections]


def _section(name: str, parser: argparse.ArgumentParser) -> nodes.section:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=_WIDTH)
    usage = parser.format_usage().removeprefix("usage: ").rstrip()
    section = nodes.section(ids=[nodes.make_id(name)], names=[name])
    section += nodes.title("", "", nodes.literal("", name))
    section += nodes.paragraph("", str(parser.description))
    section += nodes.literal_block(usage, usage, language="none")
    section += _options(parser)
    return section


def _options(parser: argparse.ArgumentParser) -> list[nodes.Node]:
    found: list[nodes.Node] = []
    for group in parser._action_groups:
        if actions := [action for action in group._group_actions if _is_own(action)]:
            if group.title not in ("options", "positional arguments"):
                found.append(nodes.paragraph("", "", nodes.strong("", str(group.title))))
            found.append(nodes.definition_list("", *map(_entry, actions)))
    return found


def _is_own(action: argparse.Action) -> bool:
    return action.dest != "help" and not isinstance(action, argparse._SubParsersAction)


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
