"""The memory that a fine-tuning takes for its model, adapters, optimizer and prior, from shapes alone.

Every figure is the sum of the sizes of tensors on the meta device, made like those of a real run. Activations are left
out: they depend on batches, attention and checkpointing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .adapters.projection import tile_rows
from .engine.binding import for_kernels
from .formats.blocks import DELTA_LIMITS, blocks_of
from .prior.deltas import Delta, tensors_of
from .prior.low_rank import LowRankDelta
from .prior.names import canonical_name, select_names
from .prior.quantized import QuantizedDelta
from .state.precision import Precision

BaseBits = Literal[4, 8, 16]
Shape = tuple[int, ...]
FLOAT32 = Precision(torch.float32, stochastic=False, master_weights=False)

# bitsandbytes' NF4 with double quantisation (functional.quantize_4bit): four-bit codes with a scale per
# NF4_BLOCK; the scales, minus their mean, are eight-bit codes with a float32 scale per SCALE_BLOCK.
NF4_BLOCK, SCALE_BLOCK = 64, 256
NF4_BOOK, SCALE_BOOK = 16, 256  # float32 entries of a matrix's two code books


class Item(NamedTuple):
    """A row of the table.

    Attributes:
        what: what is held: "gradients", "states", ...
        how: how it is held: dtype, number of tensors, ...
        nbytes: its size in bytes.
        on_host: whether it is in the host's memory instead of the device's.
    """

    what: str
    how: str
    nbytes: int
    on_host: bool = False


@dataclass(frozen=True)
class FineTuning:
    """How a model is fine-tuned.

    Attributes:
        rank: of LoRA adapters on the Linears of `modules`; None for full fine-tuning of all parameters.
        modules: what has adapters and deltas: presets such as "attn" and "mlp", or "re:REGEX".
        base_bits: 16: base weights in `dtype`. 4 or 8: Linears as bitsandbytes holds them (NF4 with double
            quantisation, int8), except the head, as in transformers, and except `kept`.
        kept: parts of names of Linears that are not quantised.
        dtype: of base weights that are not quantised, and of the parameters of full fine-tuning.
        adapter_dtype: of adapters and their gradients; PEFT's default is float32.
        precision: of the optimizer.
        prior: the dtype of deltas: float32, bfloat16, int8 or float8_e4m3fn; None without a prior.
        prior_rank: the rank of deltas that are stored as two bfloat16 factors; None for whole ones.
        prior_on_host: whether deltas stay in the host's memory.
        anchor: as in `FusedDriftAdamW`. Adapters need no extra memory for it.
    """

    rank: int | None = 16
    modules: Sequence[str] = ("attn", "mlp")
    base_bits: BaseBits = 16
    kept: Sequence[str] = ()
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    precision: Precision = FLOAT32
    prior: torch.dtype | None = torch.bfloat16
    prior_rank: int | None = None
    prior_on_host: bool = False
    anchor: bool = False


def table(model: nn.Module, how: FineTuning) -> list[Item]:
    """List what the fine-tuning of a model takes.

    Args:
        model: the model, which may be on the meta device.
        how: how it is fine-tuned.

    Returns:
        One `Item` per row (parameters, gradients, states, prior, ...).

    Raises:
        ValueError: the model has nothing of `how.modules`.
    """
    return list(_full(model, how) if how.rank is None else _adapters(model, how, how.rank))


def without_adapters(model: nn.Module, modules: Sequence[str]) -> list[str]:
    """List the matrices of `modules` that get no adapters, since they are not Linears (fused experts): PEFT's
    `target_modules` skips them.

    Args:
        model: the model, which may be on the meta device.
        modules: presets such as "attn" and "mlp", or "re:REGEX".

    Returns:
        Live parameter names.
    """
    linears = {f"{name}.weight" for name, _ in _linears(model)}
    others = {canonical_name(name): name for name, p in model.named_parameters() if p.dim() > 1 and name not in linears}
    return [others[name] for name in select_names(others, modules)]


def _full(model: nn.Module, how: FineTuning) -> Iterator[Item]:
    params = [_held(param.shape, how.dtype) for param in model.parameters()]
    yield _item("parameters", _name(how.dtype), params)
    yield _item("buffers", "unchanged", model.buffers())
    yield _item("gradients", _name(how.dtype), params)
    yield _states(params, how)
    shapes = {canonical_name(name): param.shape for name, param in model.named_parameters()}
    selected = _selected(shapes, how, "parameter")
    if how.prior is not None and how.anchor:
        held = [_held(shape, torch.bfloat16 if how.dtype == torch.bfloat16 else torch.float32) for shape in selected]
        yield _item("targets", f"{_name(held[0].dtype)}, of {len(held)} parameters", held)
        yield _item("remaining deltas", _name(held[0].dtype), held)
    elif how.prior is not None:
        deltas = [_delta(shape, how) for shape in selected]
        yield _prior(selected, how, [for_kernels(delta, delta.dtype, how.dtype) for delta in deltas])


def _adapters(model: nn.Module, how: FineTuning, rank: int) -> Iterator[Item]:
    yield from _base(model, how)
    shapes = {canonical_name(f"{name}.weight"): linear.weight.shape for name, linear in _linears(model)}
    selected = _selected(shapes, how, "Linear")
    factors = [_held(shape, how.adapter_dtype) for m, n in selected for shape in ((rank, n), (m, rank))]
    yield _item("adapters", f"{_name(how.adapter_dtype)}, rank {rank}, of {len(selected)} matrices", factors)
    yield _item("their gradients", _name(how.adapter_dtype), factors)
    yield _states(factors, how)
    if how.prior is not None:
        yield _item("their deltas", "projected, float32", [_held(factor.shape, torch.float32) for factor in factors])
        yield _prior(selected, how, [tensors_of(_delta(shape, how)) for shape in selected])
        yield _projection(selected, how)


def _base(model: nn.Module, how: FineTuning) -> Iterator[Item]:
    quantised = [] if how.base_bits == 16 else [linear.weight for linear in _quantised(model, how.kept)]
    ids = {id(weight) for weight in quantised}
    rest = [_held(param.shape, how.dtype) for param in model.parameters() if id(param) not in ids]
    if quantised:
        kind = "NF4, double quantisation" if how.base_bits == 4 else "int8"
        held = [tensor for weight in quantised for tensor in (_nf4 if how.base_bits == 4 else _int8)(weight)]
        yield _item("base weights", f"{kind}, {len(quantised)} Linears", held)
        largest = max((_held(weight.shape, how.dtype) for weight in quantised), key=_size)
        yield _item("one of them expanded", f"{_name(how.dtype)}, temporary: the largest", [largest])
    yield _item("other base weights" if quantised else "base weights", _name(how.dtype), rest)
    yield _item("buffers", "unchanged", model.buffers())


def _quantised(model: nn.Module, kept: Sequence[str]) -> Iterator[nn.Linear]:
    """The Linears that transformers quantises: all but the head and the module with the last parameter."""
    find_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    *_, (last, _) = model.named_parameters()
    for name, linear in _linears(model):
        if linear is not head and not last.startswith(f"{name}.") and not any(part in name for part in kept):
            yield linear


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]


def _nf4(weight: Tensor) -> list[Tensor]:
    """Codes, two in a byte; the codes of the scales, their scales and mean; the code books."""
    blocks = -(-weight.numel() // NF4_BLOCK)
    codes = [_held((-(-weight.numel() // 2),), torch.uint8), _held((blocks,), torch.uint8)]
    floats = ((-(-blocks // SCALE_BLOCK),), (), (NF4_BOOK,), (SCALE_BOOK,))
    return codes + [_held(shape, torch.float32) for shape in floats]


def _int8(weight: Tensor) -> list[Tensor]:
    """Codes, and a scale for each row."""
    return [_held(weight.shape, torch.int8), _held(weight.shape[:1], torch.float32)]


def _states(params: Sequence[Tensor], how: FineTuning) -> Item:
    states = [how.precision.new_state(param) for param in params]
    tensors = [tensor for state in states for tensor in state.values() if tensor.device.type == "meta"]
    masters = ", masters" if how.precision.master_weights and params[0].dtype == torch.bfloat16 else ""
    return _item("states", f"{_name(how.precision.state_dtype)}{masters}", tensors)


def _prior(shapes: Sequence[Shape], how: FineTuning, held: Sequence[Sequence[Tensor | None]]) -> Item:
    form = f"rank {how.prior_rank}, {_name(torch.bfloat16)}" if how.prior_rank else _name(how.prior)
    if how.rank is None and how.prior_rank:
        form = f"rank {how.prior_rank}, expanded"
    tensors = [tensor for one in held for tensor in one if tensor is not None]
    return _item("prior", f"{form}, {len(shapes)} deltas", tensors, how.prior_on_host)


def _projection(shapes: Sequence[Shape], how: FineTuning) -> Item:
    """For one weight after the other: the copy of its delta, if that stays on the host, and its expanded part."""

    def needed(shape: Shape) -> list[Tensor]:
        delta = _delta(shape, how)
        copied = tensors_of(delta) if how.prior_on_host else ()
        if isinstance(delta, LowRankDelta):
            return [*copied, *(_held(factor.shape, torch.float32) for factor in tensors_of(delta))]
        expanded = _held((min(tile_rows(shape[1]), shape[0]), shape[1]), torch.float32)
        return [*copied, *([] if delta.dtype == torch.float32 else [expanded])]

    largest = max(map(needed, shapes), key=lambda tensors: sum(map(_size, tensors)))
    return _item("projecting", "one delta at a time: the largest", largest)


def _delta(shape: Shape, how: FineTuning) -> Delta:
    """As it is stored: in factors if these are smaller."""
    if how.prior_rank and len(shape) == 2 and how.prior_rank * sum(shape) < math.prod(shape):
        factors = (shape[0], how.prior_rank), (how.prior_rank, shape[1])
        return LowRankDelta(*(_held(factor, torch.bfloat16) for factor in factors))
    values = _held(shape, torch.bfloat16 if how.prior_rank else how.prior)
    if values.dtype in DELTA_LIMITS:
        return QuantizedDelta(values, _held((blocks_of(values.numel()),), torch.float32))
    return values


def _selected(shapes: Mapping[str, Shape], how: FineTuning, what: str) -> list[Shape]:
    selected = [shapes[name] for name in select_names(shapes, how.modules)]
    if not selected:
        raise ValueError(f"the model has no {what} in {', '.join(how.modules)}")
    return selected


def _item(what: str, how: str, tensors: Iterable[Tensor], on_host: bool = False) -> Item:
    return Item(what, how, sum(map(_size, tensors)), on_host)


def _held(shape: Shape, dtype: torch.dtype | None) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _size(tensor: Tensor) -> int:
    return tensor.nbytes


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
