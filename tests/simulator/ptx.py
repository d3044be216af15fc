"""Parses PTX: the kernels of a file, and a kernel's instructions, with registers and literals by number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
SPACES = ("generic", "global", "shared", "local", "param")
SHARED_BASE = 1024
# As `Special` in engine.h; a grid has one dimension.
SPECIALS = [f"%{name}" for name in ("tid.x", "ctaid.x", "ntid.x", "nctaid.x", "laneid", "warpid")] + [
    f"%lanemask_{name}" for name in ("eq", "lt", "le", "gt", "ge")
]
FIXED = {
    f"%{name}.{axis}": value for name, value in (("tid", 0), ("ctaid", 0), ("ntid", 1), ("nctaid", 1)) for axis in "yz"
}
# Cache hints, and marks that an instruction is uniform across threads, do not change results.
IGNORED = {
    "cs",
    "cg",
    "ca",
    "cv",
    "lu",
    "wb",
    "wt",
    "weak",
    "volatile",
    "relaxed",
    "acquire",
    "gpu",
    "cta",
    "sys",
    "uni",
}
ENTRY = re.compile(r"\.entry (\w+)\s*\(([^)]*)\)([^{;]*)\{")


class UnknownError(Exception):
    """PTX that the simulator does not support."""


@dataclass
class Instruction:
    """An instruction. `outs` and `ins` are register numbers; a literal is ~(its index in `Entry.constants`),
    negative."""

    text: str
    operation: str
    guard: int = -1
    negated: bool = False
    outs: list[int] = field(default_factory=list)
    ins: list[int] = field(default_factory=list)
    target: int = -1
    space: int = 0
    bytes: int = 0
    count: int = 0
    is_signed: bool = False
    flag: bool = False
    offset: int = 0


def split(text: str) -> list[str]:
    """Split operands at commas outside brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def entries(text: str) -> dict[str, str]:
    """The text of each kernel, from its name on."""
    text = re.sub(r"//[^\n]*", "", text)
    return {match[1]: text[match.start() : text.index("\n}", match.end())] for match in ENTRY.finditer(text)}


def statements(body: str) -> Iterator[str]:
    """Yield instructions, directives and labels (with a colon), without the braces of scopes."""
    for part in body.split(";"):
        text = " ".join(part.split())
        while match := re.match(r"[{}] ?|([$\w]+:) ?", text):
            if match[1]:
                yield match[1]
            text = text[match.end() :]
        if text:
            yield text


def literal(text: str) -> int | None:
    if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", text):
        return int(match[1], 16)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0) & (2**64 - 1)
    return None


class Entry:
    """A kernel.

    Attributes:
        code: its instructions.
        constants: the literals.
        registers: their number; the special ones come first.
        params: offset and size of each.
        param_bytes, shared_bytes, local_bytes, max_threads: as declared.
    """

    def __init__(self, text: str) -> None:
        head = ENTRY.match(text)
        assert head is not None
        self.name = head[1]
        found = re.search(r"\.maxntid (\d+)", head[3])
        self.max_threads = int(found[1]) if found else 1024
        self.constants: list[int] = []
        self._constants: dict[int, int] = {}
        self._registers = {name: number for number, name in enumerate(SPECIALS)}
        self._symbols: dict[str, int] = {}
        self._sizes = {"shared": SHARED_BASE, "local": 0, "param": 0}
        self._declared: set[str] = set()
        self.params = [self._place(param) for param in split(head[2])]
        labels: dict[str, int] = {}
        texts: list[str] = []
        for statement in statements(text[head.end() :]):
            if statement.endswith(":"):
                labels[statement[:-1]] = len(texts)
            elif statement.startswith(".reg "):
                self._declared.update(re.findall(r"%?[A-Za-z_]\w*", statement.split(" ", 2)[2]))
            elif re.match(r"\.(shared|local) ", statement):
                self._place(statement)
            elif statement.startswith(".") and not re.match(r"\.(pragma|loc|file)\b", statement):
                raise UnknownError(f"the directive `{statement}` in {self.name}")
            elif not statement.startswith("."):
                texts.append(statement)
        self.code = [self._instruction(text, labels) for text in texts]
        self._fill_what_compilers_leave_undefined()

    registers = property(lambda self: len(self._registers))
    param_bytes = property(lambda self: self._sizes["param"])
    local_bytes = property(lambda self: self._sizes["local"])
    shared_bytes = property(lambda self: self._sizes["shared"] - SHARED_BASE)

    def _fill_what_compilers_leave_undefined(self) -> None:
        """Fill parts of a word that no instruction sets, because its uses read only other parts."""
        written = {number for instruction in self.code for number in instruction.outs}
        for instruction in self.code:
            if instruction.operation.startswith(("mov.pack", "prmt")):
                instruction.ins = [
                    number if number < len(SPECIALS) or number in written else self._constant(0xBAD)
                    for number in instruction.ins
                ]

    def _place(self, text: str) -> tuple[int, int]:
        """Allocate a variable; return its offset and size."""
        match = re.fullmatch(
            r"\.(\w+) (?:\.align (\d+) )?\.[a-z]+(\d+) (?:\.ptr (?:\.\w+ )*(?:\.align \d+ )?)?(\w+)(?:\[(\d+)\])?",
            " ".join(text.split()),
        )
        if match is None:
            raise UnknownError(f"the declaration `{text}` in {self.name}")
        space, align, kind, name, count = match.groups()
        size = BYTES[kind]
        unit = int(align or size)
        offset = -(-self._sizes[space] // unit) * unit
        self._symbols[name] = offset
        self._sizes[space] = offset + size * int(count or 1)
        return offset, size * int(count or 1)

    def _constant(self, value: int) -> int:
        if value not in self._constants:
            self._constants[value] = len(self.constants)
            self.constants.append(value)
        return ~self._constants[value]

    def _operand(self, text: str) -> int:
        value = self._symbols.get(text, FIXED.get(text, literal(text)))
        if value is not None:
            return self._constant(value)
        if text in SPECIALS or text in self._declared or text.rstrip("0123456789") in self._declared:
            return self._registers.setdefault(text, len(self._registers))
        if text == "_":
            return self._registers.setdefault(f"_{len(self._registers)}", len(self._registers))
        raise UnknownError(f"the operand {text}")

    def _operands(self, text: str) -> list[int]:
        """The registers of one operand, which may be a vector or a pair."""
        return [self._operand(part.strip()) for part in re.split(r"[,|]", text.strip("{}"))]

    def _address(self, text: str) -> tuple[int, int]:
        match = re.fullmatch(r"\[([%\w]+)(?:\+?(-?\d+))?\]", text.replace(" ", ""))
        if match is None:
            raise UnknownError(f"the address {text}")
        return self._operand(match[1]), int(match[2] or 0)

    def _instruction(self, text: str, labels: dict[str, int]) -> Instruction:
        guard = re.match(r"@(!?)([%\w]+) ", text)
        opcode, _, rest = (text[guard.end() :] if guard else text).partition(" ")
        try:
            parsed = self._parsed(text, opcode.replace("::cta", "").split("."), split(rest), labels)
            if guard:
                parsed.guard, parsed.negated = self._operand(guard[2]), guard[1] == "!"
        except (UnknownError, KeyError, ValueError, IndexError) as error:
            raise UnknownError(f"`{text}` in {self.name}: {error!r}") from None
        return parsed

    def _parsed(self, text: str, opcode: list[str], operands: list[str], labels: dict[str, int]) -> Instruction:
        kind = opcode[0]
        if kind in ("ld", "st", "atom", "red"):
            return self._access(text, opcode, operands)
        name = ".".join(part for part in opcode if part != "uni" or kind == "vote")
        parsed = Instruction(text, name)
        if kind == "bra":
            parsed.operation, parsed.target = "bra", labels[operands[0]]
        elif kind in ("ret", "exit", "trap"):
            parsed.operation = "trap" if kind == "trap" else "ret"
        elif kind in ("membar", "fence"):
            # Within a block, barriers order accesses; handovers between blocks need a fence of device scope.
            parsed.operation = "fence"
            if not {"gl", "gpu", "sys"} & set(opcode):
                raise UnknownError("a fence for less than the device")
        elif kind in ("bar", "barrier") and "warp" not in opcode:
            if operands != ["0"] or "sync" not in opcode:
                raise UnknownError("a barrier other than the block's")
            parsed.operation = "bar.sync"
        elif name == "bar.warp.sync":
            parsed.ins = self._operands(operands[0])
        elif kind == "cvta":
            parsed.operation = "cvta.to" if "to" in opcode else "cvta"
            parsed.space = SPACES.index(next(part for part in opcode if part in SPACES))
            parsed.outs, parsed.ins = self._operands(operands[0]), self._operands(operands[1])
        else:
            if kind == "mov" and "{" in operands[0]:
                parsed.operation = f"mov.unpack.b{opcode[-1][1:]}"
            elif kind == "mov" and "{" in operands[1]:
                parsed.operation = f"mov.pack.b{opcode[-1][1:]}"
            elif kind == "prmt" and (selector := literal(operands[3])) is not None:
                # Unselected values need not have been written.
                for source, bit in ((1, 0), (2, 4)):
                    if all(selector >> shift & 4 != bit for shift in (0, 4, 8, 12)):
                        operands[source] = "0"
            parsed.outs = self._operands(operands[0])
            parsed.ins = [number for text in operands[1:] for number in self._operands(text)]
        return parsed

    def _access(self, text: str, opcode: list[str], operands: list[str]) -> Instruction:
        """Parse a load, store or atomic operation."""
        kind, *parts = opcode
        space = next((part for part in parts if part in SPACES), "generic")
        hint = re.compile(r"L\d::(?!cache_hint)")  # a cache policy adds an operand
        parts = [part for part in parts if part != space and part not in IGNORED and not hint.match(part)]
        vector = next((part for part in parts if re.fullmatch(r"v\d", part)), "v1")
        *rest, of_type = [part for part in parts if part != vector and part not in ("nc", "release", "acq_rel")]
        parsed = Instruction(text, kind, space=SPACES.index(space), count=int(vector[1:]))
        parsed.bytes, parsed.is_signed = BYTES[of_type[1:]], of_type[0] == "s"
        place = 0 if kind in ("st", "red") else 1
        base, parsed.offset = self._address(operands[place])
        if place:
            parsed.outs = self._operands(operands[0])
        parsed.ins = [base, *(number for text in operands[place + 1 :] for number in self._operands(text))]
        parsed.flag = "nc" in opcode
        if kind in ("atom", "red"):
            parsed.operation = ".".join(["atom", *rest, of_type])
            parsed.flag = bool({"release", "acq_rel"} & set(opcode))
        elif rest:
            raise UnknownError(f".{rest[0]}")
        return parsed
