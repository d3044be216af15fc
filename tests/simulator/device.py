"""The simulated device, and the package's cuda backend on it, with CPU tensors."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

from drift_kernels.kernels import backends
from drift_kernels.kernels.plan import Plan

from . import ptx
from .build import Build

# What the backend's functions write, by name in the plan or the operands; other functions may write everything.
WRITTEN = {
    "update": {"param", "residual", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"},
    "grad_stats": {"partials", "arrived", "out"},
    "bias": {"grads"},
}


class _Instruction(Structure):
    """struct Instruction in engine.h."""

    _fields_ = [
        *((name, c_int32) for name in ("operation", "guard", "negated", "out_count", "in_count")),
        ("outs", c_int32 * 8),
        ("ins", c_int32 * 10),
        *((name, c_int32) for name in ("target", "space", "bytes", "count", "is_signed", "flag")),
        ("offset", c_int64),
        ("text", c_char_p),
    ]


class _Kernel(Structure):
    """struct Kernel in engine.h."""

    _fields_ = [
        ("name", c_char_p),
        ("code", POINTER(_Instruction)),
        ("constants", POINTER(c_uint64)),
        ("params", POINTER(c_int32)),
        *((name, c_int32) for name in ("length", "registers", "constant_count", "param_count")),
        *((name, c_int32) for name in ("param_bytes", "shared_bytes", "local_bytes", "max_threads")),
    ]


class _Range(Structure):
    """struct Range in engine.h."""

    _fields_ = [("begin", c_uint64), ("end", c_uint64), ("name", c_char_p), ("granule", c_int32), ("writable", c_int32)]


class FaultError(Exception):
    """A fault that the simulator found."""


def tensors_in(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor in an argument of a launch, with its name there."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth == 5:
        return
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item, name, depth + 1)
    elif isinstance(value, dict) or type(value).__module__.startswith("drift_kernels."):
        for key, item in (value if isinstance(value, dict) else getattr(value, "__dict__", {})).items():
            yield from tensors_in(item, str(key), depth + 1)


class Device:
    """Kernels by name, decoded at their first launch, and the memory that the current launch may use."""

    def __init__(self, library: Path, sources: dict[str, str]) -> None:
        self.sources = sources
        self.launched: list[str] = []  # by name
        self.memory: list[tuple[str, Tensor, bool]] = []
        self._kernels: dict[str, tuple[_Kernel, Any]] = {}
        self._operations: dict[str, int] = {}
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.simulator_reason.restype = c_char_p
        self._library.simulator_steps.restype = c_uint64
        self._prepare = ctypes.CFUNCTYPE(c_void_p, c_char_p)(self._prepared)
        self._library.simulator_prepare(self._prepare)

    def options(self, backward: bool = False, nudge: int = 0) -> None:
        """Set the order of threads and blocks, and the offset added to approximations, in ulps."""
        self._library.simulator_options(int(backward), nudge)

    def driver(self, version: int) -> None:
        """Set the CUDA version that the driver reports: 12010 is 12.1."""
        self._library.simulator_driver(version)

    @property
    def steps(self) -> int:
        """The number of instructions run so far."""
        return int(self._library.simulator_steps())

    def run(self, name: str, blocks: int, threads: int, *arguments: Any) -> None:
        """Launch a kernel with tensors, which it may write, and ctypes numbers."""
        self.memory = [(f"argument {i}", a, True) for i, a in enumerate(arguments) if isinstance(a, Tensor)]
        values = [c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
        pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        kernel = c_void_p(self._prepared(name.encode()))
        if not kernel or self._library.simulator_run(kernel, c_int64(blocks), c_int64(threads), pointers):
            raise FaultError(self._library.simulator_reason().decode())

    def change(self, name: str, source: str) -> None:
        """Replace a kernel's source."""
        self.sources[name] = source
        self._kernels.pop(name, None)

    def _prepared(self, name: bytes) -> int | None:
        try:
            self._set_ranges()
            self.launched.append(name.decode())
            kernel = self._kernels.get(name.decode()) or self._decoded(name.decode())
            return ctypes.addressof(kernel[0])
        except Exception as error:
            self._library.simulator_refuse(f"{type(error).__name__}: {error}".encode())
            return None

    def _set_ranges(self) -> None:
        """Set the memory ranges. A tensor that is part of another one has no range of its own."""
        ranges: list[_Range] = []
        spans = ((t.data_ptr(), t.data_ptr() + t.nbytes, name, t, w) for name, t, w in self.memory if t.is_contiguous())
        for begin, end, name, tensor, writable in sorted(spans, key=lambda span: (span[0], -span[1])):
            if ranges and end <= ranges[-1].end:
                ranges[-1].writable |= int(writable)
            elif begin < end:
                assert not ranges or ranges[-1].end <= begin, f"{name} overlaps another tensor"
                ranges.append(_Range(begin, end, name.encode(), tensor.element_size(), int(writable)))
        self._ranges = (_Range * len(ranges))(*ranges)  # keeps the names alive
        self._library.simulator_ranges(self._ranges, len(ranges))

    def _operation(self, instruction: ptx.Instruction) -> int:
        name = instruction.operation
        if name not in self._operations:
            self._operations[name] = self._library.simulator_operation(name.encode())
        if self._operations[name] < 0:
            raise ptx.UnknownError(f"{name}, of `{instruction.text}`")
        return self._operations[name]

    def _decoded(self, name: str) -> tuple[_Kernel, Any]:
        entry = ptx.Entry(self.sources[name])
        code = (_Instruction * len(entry.code))()
        for packed, i in zip(code, entry.code, strict=True):
            packed.operation, packed.guard, packed.negated = self._operation(i), i.guard, i.negated
            packed.out_count, packed.in_count = len(i.outs), len(i.ins)
            packed.outs[: len(i.outs)] = i.outs
            packed.ins[: len(i.ins)] = [r if r >= 0 else entry.registers + ~r for r in i.ins]
            packed.target, packed.space, packed.bytes, packed.count = i.target, i.space, i.bytes, i.count
            packed.is_signed, packed.flag, packed.offset, packed.text = i.is_signed, i.flag, i.offset, i.text.encode()
        constants = (c_uint64 * len(entry.constants))(*entry.constants)
        params = (c_int32 * (2 * len(entry.params)))(*(n for param in entry.params for n in param))
        kernel = _Kernel(
            name.encode(), code, constants, params, len(code), entry.registers, len(constants), len(entry.params)
        )
        kernel.param_bytes, kernel.shared_bytes = entry.param_bytes, entry.shared_bytes
        kernel.local_bytes, kernel.max_threads = entry.local_bytes, entry.max_threads
        self._kernels[name] = kernel, (code, constants, params)
        return self._kernels[name]


def backend_of(build: Build) -> tuple[Device, ModuleType]:
    """A device with the kernels of a build, and drift_kernels.kernels.cuda on it, which accepts CPU tensors."""
    build.finish()
    device = Device(build.simulator, {k: v for path in build.ptx for k, v in ptx.entries(path.read_text()).items()})
    extension = _imported("simulated._cuda", build.extension)
    name = f"{backends.__package__}.simulated"
    module = _imported(name, Path(inspect.getfile(backends)).with_name("cuda.py"))
    module._cuda, module._reason = extension, None
    module.READS_TENSORS = True  # so that a plan has the tensors that a launch may access
    stream = SimpleNamespace(cuda_stream=0)
    there = SimpleNamespace(device=lambda _: nullcontext(), current_stream=lambda _: stream, current_device=lambda: 0)
    module.torch = SimpleNamespace(cuda=there)
    for function in [
        name for name in vars(backends.Backend) if not name.startswith("_") and callable(getattr(module, name))
    ]:
        setattr(module, function, _launching(device, function, getattr(module, function)))
    module.unavailable = lambda device: None if device.type == "cpu" else "it runs on CPU tensors"
    sys.modules[name] = module
    return device, module


def _imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _launching(device: Device, name: str, function: Any) -> Any:
    names = list(inspect.signature(function).parameters)
    made = [key for key, value in vars(Plan).items() if isinstance(value, cached_property)]
    written = WRITTEN.get(name)

    def launch(*args: Any, **kwargs: Any) -> Any:
        for plan in args:
            if isinstance(plan, Plan):  # made here, before the launch, instead of in it
                for key in made:
                    getattr(plan, key)
        device.memory = [
            (found, tensor, written is None or found in written)
            for at, arg in zip(names, args, strict=False)
            for found, tensor in tensors_in(arg, at)
        ]
        return function(*args, **kwargs)

    return launch
