"""Predicts from machine code how close each kernel comes to a copy: python -m benchmarks.gpu.sheet

Compiles nothing and needs no GPU: it reads the built extension. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from rich.console import Console

from .. import disassembly
from . import entries
from .drawn import draw
from .kinds import HEADLINES
from .machines import ARCHITECTURES
from .measured import compare
from .printed import print_comparison, print_sheet

WIDTH = 190


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    extension = args.extension or disassembly.built()
    reason = "drift_kernels._cuda was not built: there is no nvcc" if extension is None else disassembly.missing()
    if extension is None or reason is not None:
        print(f"No sheet: {reason}", file=sys.stderr)
        return 1
    compiled = disassembly.architectures(extension)
    archs = [arch for arch in args.arch or ARCHITECTURES if arch in compiled]
    if not archs:
        parser.error(f"{extension} has code for {', '.join(compiled) or 'no architecture'} only")
    sheet = entries.make(extension, archs, args.cubins)
    names = list(dict.fromkeys(one["kernel"] for one in sheet["kernels"]))
    shown = list(HEADLINES) if args.kernel is None else [name for name in names if re.search(args.kernel, name)]
    before = None if args.before is None else entries.read(args.before)
    compared = []
    if args.measured is not None:
        try:
            compared = sheet["measured"] = compare(sheet, args.measured)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if args.json is not None:
        entries.write(sheet, args.json)
    if args.plot is not None:
        draw(sheet, args.plot, shown, before, compared)
    console = Console(width=max(WIDTH, Console().width))
    print_sheet(sheet, before, shown, console)
    if compared:
        print_comparison(compared, console)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.sheet", description=__doc__.splitlines()[0])
    parser.add_argument("--extension", type=Path, metavar="FILE", help="default: the extension built in place")
    parser.add_argument("--cubins", type=Path, metavar="FOLDER", help="Triton's kernels, as written by tests/sass.py")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, help="default: those of the extension")
    parser.add_argument("--kernel", metavar="REGEX", help="kernels to show (default: the headline modes)")
    parser.add_argument("--before", type=Path, metavar="SHEET.json", help="an earlier sheet, to show beside this one")
    parser.add_argument("--measured", type=Path, metavar="OUT", help="the output folder of `make gpu`, to compare with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures of all kernels to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the kernels shown to FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
