"""The results of each transformers release, one file a major version, and docs/families.md made of them."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from .check import Row
from .overrides import NO_CURE

_RESULTS = Path(__file__).parent / "results"
_PAGE = Path(__file__).parents[2] / "docs" / "families.md"
_FAULTS = {"silent": "silent misses", "wrong": "wrong signs", "tower": "tower moves"}
_VERDICTS = ("full", "partial", "error", "fault", "not tried")
_NUMBER = re.compile(r"\.\d+\.")
_LONGEST = 220  # characters of a message in the table

_HEAD = """# Model families

Made by `python -m tests.families`; do not edit. With names of families it runs these alone, and prints all that they
are told.

For each multimodal family of transformers, and each text-only one, with transformers' own classes at tiny size and
random weights: a base and an expert of the same language model are saved, `build_prior` makes the prior of modules attn
and mlp, the base is loaded again, and `FusedDriftAdamW` takes one `absolute` step with zero gradients. Which parameters
the two models share is found by the structure of the live models, not by this package's names. Then

- every attention and MLP matrix that both have must have moved by lr toward the expert, element by element: else it is
  a **wrong sign**, or, if it has not moved and nothing says so, a **silent miss**. What says so is an error, a warning
  of the build, or a delta that the coverage lists as without a parameter. (That some parameters have no delta says
  nothing, since a vision tower's are among them.)
- nothing but the language model may have moved: else it is a **tower move**. Both are checked with a second prior too,
  of norms, embedding and head besides.

Verdicts: **full**, all matrices bound; **partial**, some, and the others are told of; **error**, nothing is bound, and
an error says so; **fault**, one of the three above. n/m: matrices bound, of those that both have. The cure in the last
column was tried; it binds all of them unless it says how many. If nothing that was tried helps, it says why where that
is known. Where transformers has no text-only class for a language model, its bare text model is the expert.
"""


def counts(rows: Sequence[Row]) -> str:
    """One line: how many families came out how, and how many parameters of each fault."""
    found = Counter(row.verdict for row in rows)
    parts = [f"{len(rows)} families"] + [f"{found[verdict]} {verdict}" for verdict in _VERDICTS]
    return ", ".join(parts + [f"{sum(len(getattr(row, k)) for row in rows)} {words}" for k, words in _FAULTS.items()])


def save(rows: Sequence[Row]) -> None:
    _RESULTS.mkdir(exist_ok=True)
    lines = [json.dumps(row.as_json()) for row in rows]
    head = {"transformers": hf.__version__, "torch": torch.__version__.partition("+")[0]}
    path = _RESULTS / f"transformers-{hf.__version__.partition('.')[0]}.jsonl"
    path.write_text("\n".join([json.dumps(head), *lines]) + "\n")


def write_page() -> None:
    runs = {}
    for path in sorted(_RESULTS.glob("transformers-*.jsonl"), reverse=True):
        head, *rows = map(json.loads, path.read_text().splitlines())
        runs[f"{head['transformers']} (torch {head['torch']})"] = [Row(**row) for row in rows]
    _PAGE.write_text(_HEAD + "\n".join(_sections(runs)) + "\n")


def _sections(runs: dict[str, list[Row]]) -> Iterable[str]:
    yield ""
    columns = ["families", *_VERDICTS, *_FAULTS.values()]
    yield from _table(["transformers", *columns], [[v, *re.findall(r"\d+", counts(rows))] for v, rows in runs.items()])
    merged: dict[tuple[bool, str], dict[str, Row]] = defaultdict(dict)
    for version, rows in runs.items():
        for row in rows:
            merged[not row.multimodal, row.family][version] = row
    tried = {key: rows for key, rows in merged.items() if any(row.verdict != "not tried" for row in rows.values())}
    for text_only, title in enumerate(("Multimodal families", "Text-only families: the expert is of the same class")):
        yield f"\n## {title}\n"
        short = [version.partition(" ")[0] for version in runs]
        yield from _table(
            ["family", "class", "expert", "stored prefix", "live prefix", *short, "norm, embed, head", "told", "cure"],
            [_line(rows, list(runs)) for (group, _), rows in sorted(tried.items()) if group == bool(text_only)],
        )
    for field, words in _FAULTS.items():
        yield f"\n## {words[0].upper()}{words[1:]}\n"
        faults = [(key, version, row) for key, rows in sorted(merged.items()) for version, row in rows.items()]
        faults = [
            (key[1], version.partition(" ")[0], names) for key, version, row in faults if (names := getattr(row, field))
        ]
        yield from (
            _table(["family", "transformers", "parameters"], [[*f[:2], _kinds(f[2])] for f in faults])
            if faults
            else ["None."]
        )
    yield "\n## Left alone\n"
    yield "Matrices of the layers that are neither attention nor MLP (routers, convolutions, state spaces) and have not"
    yield "moved, and norms, embeddings and heads that have not moved when they were asked for:\n"
    alone = [
        (row.family, _kinds(row.beside), _kinds(row.rest_missed)) for rows in tried.values() for row in [_best(rows)]
    ]
    yield from _table(["family", "beside", "of norm, embed and head"], [list(a) for a in alone if a[1] or a[2]])
    yield "\n## Not tried\n"
    reasons = [
        (key[1], version.partition(" ")[0], row)
        for key, rows in sorted(merged.items())
        for version, row in rows.items()
    ]
    yield from _table(
        ["family", "transformers", "why"],
        [[f, v, _cell(row.told)] for f, v, row in reasons if row.verdict == "not tried"],
    )


def _line(rows: dict[str, Row], versions: Sequence[str]) -> list[str]:
    best = _best(rows)
    verdicts = []
    for version in versions:
        row = rows.get(version)
        tried = row is not None and row.verdict != "not tried"
        verdicts.append(f"{row.verdict} {row.bound}/{row.shared}" if tried else "not tried" if row else "-")
    worst = min(rows.values(), key=lambda row: (row.verdict == "not tried", row.bound - row.shared))
    cure = NO_CURE.get(worst.family, worst.cure) if worst.cure == "none found" else worst.cure
    prefixes = [
        " / ".join(dict.fromkeys(f"`{p}`" for row in rows.values() if (p := getattr(row, end))))
        for end in ("stored", "live")
    ]
    return [best.family, best.model, best.expert, *prefixes, *verdicts, best.rest, _cell(worst.told), _cell(cure)]


def _best(rows: dict[str, Row]) -> Row:
    """The row of the newest release on which it was tried."""
    return next((row for row in rows.values() if row.verdict != "not tried"), next(iter(rows.values())))


def _kinds(names: Iterable[str]) -> str:
    """Names without their layer numbers, each kind once."""
    return ", ".join(dict.fromkeys(f"`{_NUMBER.sub('.N.', name)}`" for name in names))


def _cell(text: str) -> str:
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
    return text.replace("|", "\\|").replace("<", "&lt;")


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterable[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
