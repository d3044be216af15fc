"""Turns timings into rows, and rows into a table."""

from __future__ import annotations

from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from drift_kernels.kernels.operands import dtype_name

from ..captions import Row, commit, number
from .contender import Contender
from .measure import Spread, Timing
from .memory import Memory
from .modes import label_of

# Rivals with a prior: ours are compared with them in separate columns.
RIVALS = {"foreach_bias": "x foreach\n+ fused", "hook": "x hook\n+ fused"}


def make_rows(
    contenders: list[Contender],
    timings: list[list[Timing]],
    memory: list[Memory],
    common: Row,
) -> list[Row]:
    """Return one row per contender: its description, the median and quartiles of its times, and their ratios to rivals'
    medians.

    Contenders that clip are compared with rivals that clip. `rounding`, `master`, `prior_dtype` and `prior_device` are
    set for ours, the last two with a prior.

    `gb_per_s` is the bytes that the step must move over the median time. It ignores what else a contender moves, so it
    compares across contenders; it and `percent_of_copy` are None if no copy was measured. `common` is in every row.
    """
    spreads = [Spread.of([timing.ms for timing in times]) for times in timings]

    def gb_per_s(contender: Contender, spread: Spread) -> float:
        return contender.bytes / spread.median / 1e6

    def ratio(spread: Spread, name: str, scaling: str | None, clip: bool) -> dict[str, float] | None:
        for rival, theirs in zip(contenders, spreads, strict=True):
            if (rival.name, rival.scaling, rival.clip) == (name, scaling, clip):
                return Spread(*(ms / theirs.median for ms in spread))._asdict()
        return None

    def percent_of_streams(contender: Contender, spread: Spread) -> float | None:
        what = (contender.scaling, contender.clip, contender.mode)
        for limit, limits in zip(contenders, spreads, strict=True):
            if limit.name == "streams" and contender.name == "cpu" and (limit.scaling, limit.clip, limit.mode) == what:
                return 100 * limits.median / spread.median
        return None

    copy = next((gb_per_s(c, s) for c, s in zip(contenders, spreads, strict=True) if c.name == "copy"), None)
    copy_clip = min(contender.clip for contender in contenders if contender.name == "fused")
    rows = []
    for contender, spread, times, kept in zip(contenders, spreads, timings, memory, strict=True):
        clip = copy_clip if contender.name == "copy" else contender.clip
        mode = contender.mode
        row = {
            "contender": contender.name,
            "label": contender.label,
            "ours": contender.ours,
            "scaling": contender.scaling or "none",
            "clip": contender.clip,
            "states": None if contender.state_dtype is None else dtype_name(contender.state_dtype),
            "rounding": None if mode is None else mode.rounding,
            "master": None if mode is None else mode.master,
            "prior_dtype": None if mode is None or contender.scaling is None else mode.prior_name,
            "prior_device": None if mode is None or contender.scaling is None else mode.prior_device or "same",
            "ms": spread._asdict(),
            "min_ms": min(timing.ms for timing in times),
            "host_ms": Spread.of([timing.host_ms for timing in times])._asdict(),
            "bytes": contender.bytes,
            "bytes_per_param": contender.bytes / common["params"],
            **kept._asdict(),
            "gb_per_s": None if copy is None else gb_per_s(contender, spread),
            "percent_of_copy": None if copy is None else 100 * gb_per_s(contender, spread) / copy,
            "percent_of_streams": percent_of_streams(contender, spread),
            "ratio_to_fused": ratio(spread, "fused", None, clip),
        }
        for rival in RIVALS:
            row[f"ratio_to_{rival}"] = ratio(spread, rival, contender.scaling, clip) if contender.ours else None
        rows.append({**row, **common})
    return rows


def print_table(rows: list[Row], console: Console) -> None:
    """Print the rows in one section per scaling; ours in bold."""
    first = rows[0]
    on_gpu, with_rate = first["device_type"] == "cuda", first["gb_per_s"] is not None
    with_streams = any(row["percent_of_streams"] is not None for row in rows)
    rivals = {
        f"ratio_to_{rival}": heading
        for rival, heading in RIVALS.items()
        if any(row[f"ratio_to_{rival}"] is not None for row in rows)
    }
    table = Table(box=box.SIMPLE_HEAD, title=title(first), caption=caption(first))
    table.title_justify = table.caption_justify = "left"
    table.add_column("step", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    numbers = ["ms", "quartiles", "x torch\nfused", *rivals.values()]
    numbers += ["stored\nB/param"]
    numbers += ["moved\nB/param", "GB/s", "of a\ncopy"] if with_rate else []
    numbers += ["of\nstreams"] if with_streams else []
    numbers += ["peak\nB/param", "host ms"] if on_gpu else []
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)

    for heading, section in groupby(rows, key=section_title):
        table.add_section()
        table.add_row(heading, style="italic")
        for row in section:
            ms = row["ms"]
            cells = [f"  {row['label']}", label_of(row)]
            cells += [number(ms["median"]), f"{number(ms['low'])}-{number(ms['high'])}"]
            for ratio in (row[key] for key in ("ratio_to_fused", *rivals)):
                cells.append("" if ratio is None else f"{ratio['median']:.2f}")
            cells.append(_per_param(row, "stored_bytes"))
            if with_rate:
                cells += [f"{row['bytes_per_param']:.1f}", number(row["gb_per_s"]), f"{row['percent_of_copy']:.0f}%"]
            if with_streams:
                percent = row["percent_of_streams"]
                cells.append("" if percent is None else f"{percent:.0f}%")
            if on_gpu:
                cells += [_per_param(row, "peak_extra_bytes"), number(row["host_ms"]["median"])]
            table.add_row(*cells, style="bold" if row["ours"] else None)
    console.print(table)


def section_title(row: Row) -> str:
    prior = "without a prior" if row["scaling"] == "none" else f"prior, {row['scaling']}"
    return f"{prior}, clipping" if row.get("clip") else prior  # older rows have neither clip nor layers


def _per_param(row: Row, key: str) -> str:
    return "" if row[key] is None else f"{row[key] / row['params']:.1f}"


def title(row: Row) -> str:
    """The parameters that were stepped."""
    scale = "" if row["scale"] == 1 else f" with widths divided by {row['scale']:.3g}"
    if row.get("layers") is not None:
        scale = f", the first {row['layers']} layers" if row["layers"] > 1 else ", the first layer"
    biased = "all" if row["biased_params"] == row["params"] else f"{row['biased_params']:,}"
    return (
        f"One optimizer step: {row['model']}{scale}, {row['tensors']} tensors, {row['params']:,} {row['dtype']} "
        f"parameters, {biased} under the prior"
    )


def caption(row: Row) -> str:
    """The device, the versions, the commit and the repetitions."""
    threads = f", {row['threads']} threads" if row["device_type"] == "cpu" else ""
    return (
        f"{row['device']}{threads}, load {row['load']}; torch {row['torch']}, triton {row['triton'] or 'none'}, "
        f"Python {row['python']}; {commit(row)}; median and quartiles of {row['reps']} interleaved repetitions"
    )
