"""A rank's part of a tensor and of a prior: the right elements, damage is found, and no extra memory is used."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from drift_kernels import FusedDriftAdamW, PriorFormatError, build_prior
from drift_kernels.formats.philox import WHOLE
from drift_kernels.prior import BLOCK, Prior, QuantizedDelta, quantize
from drift_kernels.prior.files import TensorFile
from drift_kernels.prior.norms import CHUNK, norm
from drift_kernels.prior.stored import StoredValues
from drift_kernels.sharding import Reduction, keeps_blocks, place_of, wrap
from drift_kernels.sharding import Shard as Part

BF16, INT8 = torch.bfloat16, torch.int8


# Parts of tensors


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """A shape and a part of it; many of its sizes are whole blocks of codes."""
    sizes = st.sampled_from([1, 2, 3, 8, BLOCK // 2, BLOCK, 2 * BLOCK, 3 * BLOCK])
    shape = tuple(draw(st.lists(sizes, min_size=1, max_size=3)))
    ends = [sorted(draw(st.tuples(*[st.integers(0, 8)] * 2))) for _ in shape]
    return shape, tuple(slice(begin * n // 8, end * n // 8) for (begin, end), n in zip(ends, shape, strict=True))


@given(boxes())
def test_place_has_the_indices_of_a_part(case: tuple[tuple[int, ...], tuple[slice, ...]]) -> None:
    shape, box = case
    expected = torch.arange(math.prod(shape)).view(shape)[box].flatten()
    place = Part(shape, box, ()).place
    if place is None:
        assert len(shape) > 2
    else:
        assert torch.equal(place.indices(expected.numel()), expected)


@given(
    case=boxes(), dtype=st.sampled_from([torch.float32, BF16, INT8, torch.float8_e4m3fn]), seed=st.integers(0, 2**32)
)
def test_a_part_of_a_delta_is_that_part_of_the_whole(
    tmp_path: Path, case: tuple[tuple[int, ...], tuple[slice, ...]], dtype: torch.dtype, seed: int
) -> None:
    """In memory, and in a file, of which no further row is read."""
    shape, box = case
    delta: Tensor | QuantizedDelta = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    delta = quantize(delta, dtype) if dtype.itemsize == 1 else delta.to(dtype)
    tensors = {"w": delta} if isinstance(delta, Tensor) else {"w": delta.codes, "w.scales": delta.scales}
    save_file(tensors, tmp_path / "w.safetensors")
    stored = TensorFile.inspect(tmp_path / "w.safetensors").tensors
    in_memory = Prior.from_mapping({"w": delta})
    expected = in_memory.load("w")[box]
    for part in (
        in_memory.load_stored("w", box=box),
        StoredValues("w", in_memory.info("w"), None, stored["w"], stored.get("w.scales")).load(box),
    ):
        found = part.expand() if isinstance(part, QuantizedDelta) else part
        assert found.is_contiguous()
        assert torch.equal(found, expected)


def test_a_shard_of_several_inner_dimensions_has_no_random_bits() -> None:
    shard = Part((4, 8, 8), (slice(0, 4), slice(0, 4), slice(0, 4)), ())
    assert place_of("w", shard, needed=False) == WHOLE
    with pytest.raises(ValueError, match=r"sharded along more than one inner dimension, got w of shape \(4, 8, 8\)"):
        place_of("w", shard, needed=True)
    empty = Part((4, 8, 1), (slice(0, 4), slice(4, 8), slice(1, 1)), ())
    assert place_of("w", empty, needed=True).indices(0).tolist() == [], "where there is nothing, nothing is drawn"


def damaged_prior(folder: Path) -> str:
    """Write a damaged prior. Each rank reads a part, whose norm alone cannot show the damage."""
    param = nn.Parameter(distribute_tensor(torch.zeros(64, 8), init_device_mesh("cpu", (2,)), [Shard(0)]))
    optimizer = FusedDriftAdamW([("layers.0.mlp.up_proj.weight", param)], prior=folder)
    param.grad = torch.ones_like(param)
    with pytest.raises(PriorFormatError, match="is damaged: its norm is") as error:
        optimizer.step()
    assert not param.to_local().any()
    return str(error.value)


def test_a_damaged_prior_is_found_by_all_ranks(tmp_path: Path) -> None:
    name = "layers.0.mlp.up_proj.weight"
    for role in ("expert", "base"):
        (tmp_path / role).mkdir()
        save_file({f"model.{name}": torch.randn(64, 8)}, tmp_path / role / "model.safetensors")
        (tmp_path / role / "config.json").write_text("{}")
    folder = tmp_path / "prior"
    build_prior(tmp_path / "expert", tmp_path / "base", folder, dtype=torch.float32)
    (file,) = folder.glob("*-of-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-4:] = b"\0\0\x80\x42"  # 64.0, in the last row
    file.write_bytes(content)
    assert len(set(ranks.run(damaged_prior, 2, tmp_path, folder))) == 1


PLACEMENTS = {
    "rows": (Shard(0), Replicate()),
    "columns": (Replicate(), Shard(1)),
    "rows and columns": (Shard(0), Shard(1)),
    "twice by columns": (Shard(1), Shard(1)),
    "replicated": (Replicate(), Replicate()),
}
WIDTHS = (96, 128, 256, 384, 512, 640, 768, 1024)


def layouts() -> dict[tuple[str, int], tuple[bool, slice]]:
    """Whether this rank takes rows to be of whole blocks, and which columns it holds."""
    mesh, found = init_device_mesh("cpu", (2, 2)), {}
    for label, placements in PLACEMENTS.items():
        for columns in WIDTHS:
            tensor = distribute_tensor(torch.randn(6, columns), mesh, placements)
            found[label, columns] = keeps_blocks(tensor, BLOCK), Part.of(tensor).box[1]
            for like, shape in ((tensor, None), (tensor, (6, 2 * columns)), (tensor[None], None)):
                values = torch.randn(like.shape if shape is None else shape)
                own = distribute_tensor(values, mesh, like.placements).to_local()
                wrapped = wrap(own, like, shape)
                assert (wrapped.shape, wrapped.stride()) == (values.shape, values.stride())
                assert torch.equal(wrapped.to_local(), own)
    return found


def test_blocks_are_kept_where_every_rank_holds_whole_ones_and_wrapping_keeps_shapes_and_strides(
    tmp_path: Path,
) -> None:
    found = ranks.run(layouts, 4, tmp_path)
    for key, (kept, _) in found[0].items():
        held = [of_rank[key][1] for of_rank in found]
        whole_blocks = all(part.start % BLOCK == part.stop % BLOCK == 0 for part in held)
        assert [of_rank[key][0] for of_rank in found] == 4 * [kept]
        assert kept == whole_blocks, (key, held)


def reduced() -> bool:
    mesh = init_device_mesh("cpu", (2,))
    rows = Part.of(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)]))
    reduction = Reduction([rows, rows])
    for values, found in (([0.0, 0.0], False), ([0.0, -1.0 if mesh.get_rank() == 1 else 0.0], True)):
        assert reduction.any_of(values, torch.device("cpu")) == found
    return bool(reduction)


def test_all_ranks_see_what_one_does(tmp_path: Path) -> None:
    assert ranks.run(reduced, 2, tmp_path) == [True, True]


# Memory

LAYERS, ROWS, COLUMNS = 2, 8192, 6144  # in bfloat16: 96 MiB per layer, much more than the libraries' own memory


def binding_memory(folder: Path) -> float:
    """The peak memory while binding a prior, in MiB above the memory before."""
    mesh = init_device_mesh("cpu", (2,))
    named = []
    for layer in range(LAYERS):
        own = torch.zeros(ROWS // 2, COLUMNS, dtype=BF16)
        param = nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False))
        named.append((f"layers.{layer}.mlp.up_proj.weight", param))
    optimizer = FusedDriftAdamW(named, prior=folder)
    binding = optimizer._engine.binding
    assert binding is not None
    # Memory that libraries take at their first use, for code and workspace, does not count.
    norm(torch.ones(CHUNK, dtype=BF16))
    dist.all_reduce(torch.ones(1))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    bounds = binding.bind([(name, param.to_local(), Part.of(param)) for name, param in named])
    assert all(bound is not None and bound.delta.numel() == ROWS * COLUMNS // 2 for bound in bounds)
    return resident("VmHWM") - before


def resident(which: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which)]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts resident memory")
def test_binding_needs_the_ranks_share_and_never_a_whole_tensor(tmp_path: Path) -> None:
    for role in ("expert", "base"):
        (tmp_path / role).mkdir()
        weights = {
            f"model.layers.{layer}.mlp.up_proj.weight": torch.empty(ROWS, COLUMNS, dtype=BF16).uniform_()
            for layer in range(LAYERS)
        }
        save_file(weights, tmp_path / role / "model.safetensors")
        (tmp_path / role / "config.json").write_text("{}")
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    one = ROWS * COLUMNS * 2 / 2**20
    for found in ranks.run(binding_memory, 2, tmp_path, tmp_path / "prior"):
        assert found < LAYERS * one / 2 + one / 2
