"""The sheet as tables, optionally beside an earlier sheet, and measurements beside predictions."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ...captions import commit, number
from .entries import Entry, Sheet, by_kernel
from .kinds import label
from .machines import ARCHITECTURES, LATENCIES

PIPES = ("FP32", "IMAD", "ALU", "CVT", "XU", "LSU", "CTRL")
LOW, HIGH = map(str, LATENCIES)
ARROW = " > "  # from before to now


def print_sheet(sheet: Sheet, before: Sheet | None, shown: list[str], console: Console) -> None:
    """Print, for each architecture, the contents of the named kernels, then their predicted speed."""
    earlier = {} if before is None else by_kernel(before)
    for arch in ARCHITECTURES:
        found = {(one["arch"], one["kernel"]): one for one in sheet["kernels"]}
        rows = [(found[arch, name], earlier.get((arch, name))) for name in shown if (arch, name) in found]
        if rows:
            console.print(_contents(arch, rows))
            console.print(_shares(arch, rows))
            for remark in dict.fromkeys(remark for entry, _ in rows for remark in entry["remarks"]):
                of = "; ".join(label(entry["kernel"]) for entry, _ in rows if remark in entry["remarks"])
                console.print(f"{remark}: {of}", style="italic")
    console.print(caption(sheet, before))


def caption(sheet: Sheet, before: Sheet | None = None) -> str:
    since = "" if before is None else f"; before: {commit(before)}"
    triton = "" if sheet["triton"] is None else f", Triton {sheet['triton']}"
    return f"{sheet['what']}; {commit(sheet)}{since}; {sheet['compiler']}{triton}"


def _table(title: str, columns: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("kernel", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _from(before: str | None, now: str) -> str:
    return now if before in (None, now) else f"{before}{ARROW}{now}"


def _contents(arch: str, rows: list[tuple[Entry, Entry | None]]) -> Table:
    table = _table(
        f"{arch}: instructions per element, by pipe, and occupancy of a multiprocessor",
        ["bytes per\nelement", "instructions\nper element", *PIPES, "other", "registers", "blocks", "KB in\nflight"],
    )

    def cells(entry: Entry) -> list[str]:
        pipes = entry["pipes"]
        other = sum(count for pipe, count in pipes.items() if pipe not in PIPES)
        flights = [machine["kb_in_flight"] for machine in entry["machines"].values()]
        return [
            f"{entry['bytes_per_element']:.1f}",
            f"{entry['instructions_per_element']:.1f}",
            *(f"{pipes.get(pipe, 0):.1f}" for pipe in PIPES),
            f"{other:.1f}",
            str(entry["registers"]),
            str(entry["blocks"]),
            f"{max(flights):.0f}",
        ]

    compared = (0, 1, *range(len(PIPES) + 3, len(PIPES) + 6))  # not every pipe, so that a line fits
    for entry, earlier in rows:
        now = cells(entry)
        if earlier is not None:
            old = cells(earlier)
            now = [_from(old[k], cell) if k in compared else cell for k, cell in enumerate(now)]
        table.add_row(label(entry["kernel"]), *now)
    return table


def _shares(arch: str, rows: list[tuple[Entry, Entry | None]]) -> Table:
    """Shares in percent of a copy at the low and the high latency, the lowest ceilings at the high one,
    microseconds."""
    names = list(rows[0][0]["machines"])
    columns = [column for name in names for column in (f"{name}\n{LOW}/{HIGH} ns", "bound by", "us per\nmillion")]
    table = _table(
        f"{arch}: predicted share of a copy, in percent, and the share that each part alone would allow", columns
    )
    for entry, earlier in rows:
        cells = []
        for name in names:
            now, old = entry["machines"][name], None if earlier is None else earlier["machines"].get(name)
            cells.append(_from(None if old is None else share(old), share(now)))
            cells.append(bounds(now))
            cells.append(_from(None if old is None else number(old["us_per_million"]), number(now["us_per_million"])))
        table.add_row(label(entry["kernel"]), *cells)
    return table


def share(machine: dict[str, Any]) -> str:
    return "/".join(f"{100 * machine['share'][ns]:.0f}" for ns in (LOW, HIGH))


def bounds(machine: dict[str, Any]) -> str:
    """What limits the kernel first, and the next limit if that is close."""
    if machine["bound"] == "memory":
        return "memory"
    ceilings = sorted(machine["ceilings"].items(), key=lambda one: one[1])
    near = [f"{part} {100 * at:.0f}" for part, at in ceilings[:2] if at <= 1.3 * ceilings[0][1]]
    return ", ".join(near)


def print_comparison(compared: list[dict[str, Any]], console: Console) -> None:
    table = _table(
        "share of a copy in the same run, in percent",
        ["machine", "backend", "run", "scaling", f"predicted\n{LOW}/{HIGH} ns", "measured"],
    )
    for one in compared:
        predicted = "/".join(f"{one['predicted_percent'][ns]:.0f}" for ns in (LOW, HIGH))
        scaling = f"{one['scaling']}{', clipping' if one['clip'] else ''}"
        table.add_row(
            one["mode"],
            one["machine"],
            one["backend"],
            one["run"] or "",
            scaling,
            predicted,
            f"{one['measured_percent']:.0f}",
        )
    console.print(table)
