"""drift-prior memory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..errors import CheckpointError
from ..footprint import FineTuning, Item, table, without_adapters
from ..prior.in_memory import UnknownModelError, meta_model
from ..prior.names import some
from ..state.precision import Precision
from ..terminal import console
from .arguments import Commands, add_command, modules
from .output import print_json

_FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
_STATES = {**_FLOATS, "int8": torch.int8}
_PRIORS = {**_STATES, "fp8": torch.float8_e4m3fn}
_LEFT_OUT = (
    "Not included: activations, which depend on batches, attention and checkpointing; memory that the driver, the "
    "allocator and bitsandbytes keep for themselves."
)


def add(commands: Commands) -> None:
    memory = add_command(commands, "memory", "estimate the memory for fine-tuning a model, from its config.json", _run)
    memory.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="a config.json, its folder, or a Hub id (org/name or org/name@revision); weights are not read",
    )
    kind = memory.add_mutually_exclusive_group()
    kind.add_argument("--rank", type=_positive, default=16, help="rank of LoRA adapters (default: 16)")
    kind.add_argument("--full", action="store_true", help="full fine-tuning, without adapters")
    memory.add_argument(
        "--modules",
        type=modules,
        default=["attn", "mlp"],
        help="layers with adapters and deltas, as for build (default: attn,mlp)",
    )
    base = memory.add_argument_group("base weights under adapters")
    base.add_argument(
        "--base-bits",
        type=int,
        choices=(4, 8, 16),
        default=16,
        help="quantise Linear layers as transformers and bitsandbytes do: 4 for NF4 with double quantisation, 8 for "
        "int8 (default: 16, not quantised)",
    )
    base.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="NAME",
        help="do not quantise Linear layers with NAME in their name; may be repeated. The head is never quantised",
    )
    held = memory.add_argument_group("trained parameters")
    held.add_argument(
        "--dtype",
        choices=_FLOATS,
        default="bf16",
        help="dtype of parameters that are not quantised; PEFT's prepare_model_for_kbit_training casts them to fp32 "
        "(default: bf16)",
    )
    held.add_argument(
        "--adapter-dtype", choices=_FLOATS, default="fp32", help="dtype of adapters (default: fp32, as in PEFT)"
    )
    held.add_argument(
        "--state-dtype", choices=_STATES, default="fp32", help="dtype of exp_avg and exp_avg_sq (default: fp32)"
    )
    held.add_argument("--master-weights", action="store_true", help="keep master weights of bfloat16 parameters")
    prior = memory.add_argument_group("prior")
    form = prior.add_mutually_exclusive_group()
    form.add_argument("--prior-dtype", choices=_PRIORS, default="bf16", help="storage format of deltas (default: bf16)")
    form.add_argument("--prior-rank", type=_positive, metavar="R", help="low-rank deltas: two bf16 factors of rank R")
    form.add_argument("--no-prior", action="store_true", help="plain fine-tuning, without a prior")
    prior.add_argument(
        "--prior-device", choices=("device", "cpu"), default="device", help="where deltas are kept (default: device)"
    )
    prior.add_argument("--anchor", action="store_true", help="as with the optimizer's anchor=True")
    memory.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def _run(arguments: argparse.Namespace, errors: Console) -> int:
    how = FineTuning(
        rank=None if arguments.full else arguments.rank,
        modules=arguments.modules,
        base_bits=arguments.base_bits,
        kept=arguments.keep,
        dtype=_FLOATS[arguments.dtype],
        adapter_dtype=_FLOATS[arguments.adapter_dtype],
        precision=Precision(_STATES[arguments.state_dtype], False, arguments.master_weights),
        prior=None if arguments.no_prior else _PRIORS[arguments.prior_dtype],
        prior_rank=arguments.prior_rank,
        prior_on_host=arguments.prior_device == "cpu",
        anchor=arguments.anchor,
    )
    folder = Path(arguments.model).expanduser()
    name, _, revision = (str(folder), "", "") if folder.exists() else arguments.model.partition("@")
    try:
        model, kind = meta_model(name, revision or None)
        items = table(model, how)
    except (UnknownModelError, ValueError) as error:
        raise CheckpointError(f"{arguments.model}: {error}") from error
    left_alone = [] if arguments.full else without_adapters(model, how.modules)
    if arguments.json:
        found = {on_host: sum(item.nbytes for item in items if item.on_host == on_host) for on_host in (False, True)}
        print_json(
            {
                "model": kind,
                "items": [item._asdict() for item in items],
                "device": found[False],
                "host": found[True],
                "without_adapters": left_alone,
            }
        )
    else:
        _print(kind, items, left_alone)
    return 0


def _print(kind: str, items: Sequence[Item], left_alone: Sequence[str]) -> None:
    places = (False, True) if any(item.on_host for item in items) else (False,)
    print(f"{kind.partition(' in memory')[0]}, in GiB")
    shown = Table(show_edge=False, pad_edge=False)
    for title in ("", "held as"):
        shown.add_column(title, overflow="fold")
    for on_host in places:
        shown.add_column("host" if on_host else "device", justify="right")
    for item in items:
        shown.add_row(item.what, item.how, *(_gib(item.nbytes) if item.on_host == place else "" for place in places))
    shown.add_section()
    totals = [sum(item.nbytes for item in items if item.on_host == place) for place in places]
    shown.add_row("total", "", *map(_gib, totals))
    console().print(shown)
    if left_alone:
        print(f"No adapters on {len(left_alone)} parameters that are not in Linear layers: {some(left_alone)}")
    print(_LEFT_OUT)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3f}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
