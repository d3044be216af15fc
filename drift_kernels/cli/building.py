"""drift-prior build."""

from __future__ import annotations

import argparse

from rich.console import Console

from ..prior import build_prior
from ..prior.names import PRESETS
from .arguments import CHECKPOINT, DTYPES, Commands, add_command, layers, modules, name_rule, rank
from .output import progress_bar


def add(commands: Commands) -> None:
    build = add_command(commands, "build", "make a prior from checkpoints: expert - base, or expert - reference", _run)
    build.add_argument("--expert", required=True, metavar="CHECKPOINT", help=f"the fine-tuned model: {CHECKPOINT}")
    build.add_argument(
        "--base",
        required=True,
        metavar="CHECKPOINT",
        help="the model that training starts from (same forms as --expert)",
    )
    build.add_argument(
        "--reference", metavar="CHECKPOINT", help="subtract this model instead of the base (same forms as --expert)"
    )
    build.add_argument("--out", required=True, metavar="DIR", help="folder to write the prior to")
    build.add_argument("--overwrite", action="store_true", help="replace an existing prior")
    build.add_argument(
        "--modules",
        type=modules,
        default=["attn", "mlp"],
        help=f"comma-separated: any of {','.join(PRESETS)}, followed by any number of re:REGEX, which are searched in "
        "canonical names (default: attn,mlp)",
    )
    build.add_argument("--no-bias", dest="include_bias", action="store_false", help="leave out biases")
    build.add_argument(
        "--layers", type=layers, help="layers to include, such as 0-27 or 0-3,8, numbered as in the base (default: all)"
    )
    build.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bf16",
        help="storage format of deltas; int8 and fp8 take half the memory of bf16 (default: bf16)",
    )
    build.add_argument(
        "--rank",
        type=rank,
        metavar="R",
        help="store each matrix as two bf16 factors of this rank, if that is smaller; all else is stored as --dtype",
    )
    build.add_argument(
        "--name-map",
        type=name_rule,
        action="append",
        default=[],
        metavar="PREFIX=CANONICAL",
        help="a rule for tensor names that are not recognised, such as transformer.h.=layers.; may be repeated",
    )


def _run(arguments: argparse.Namespace, errors: Console) -> int:
    with progress_bar(errors) as bar:
        task = bar.add_task("building", total=None)
        prior = build_prior(
            arguments.expert,
            arguments.base,
            arguments.out,
            reference=arguments.reference,
            modules=arguments.modules,
            layers=arguments.layers,
            include_bias=arguments.include_bias,
            dtype=DTYPES[arguments.dtype],
            rank=arguments.rank,
            name_map=dict(arguments.name_map),
            overwrite=arguments.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{arguments.out}: {len(prior)} deltas, {prior.numel:,} elements, fingerprint {prior.fingerprint[:12]}")
    return 0
