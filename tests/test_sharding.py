"""Sharded parameters (DTensors) against the same run in one process, in real processes."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from drift_kernels import FusedDriftAdamW, GradientBias, PriorFormatError, build_prior
from drift_kernels.coefficients import SCALINGS
from drift_kernels.prior import Prior, QuantizedDelta, quantize
from drift_kernels.prior.files import TensorFile
from drift_kernels.prior.prior import StoredDelta
from drift_kernels.sharding import Shard as Part

BF16, INT8 = torch.bfloat16, torch.int8

# Rows of whole blocks, of none, of an odd number of elements; fewer rows than ranks; fewer elements than ranks.
SHAPES = {
    "layers.0.mlp.up_proj.weight": (33, 256),
    "layers.0.mlp.down_proj.weight": (64, 136),
    "layers.0.self_attn.q_proj.weight": (37, 31),
    "layers.0.self_attn.k_proj.weight": (3, 1024),
    "layers.0.self_attn.k_proj.bias": (3,),
    "layers.0.input_layernorm.weight": (66,),
}
CUT = "layers.0.mlp.down_proj.weight"  # whose blocks of codes a sharding may cut: it has float32 states then
SKIPS = "layers.0.self_attn.q_proj.weight"  # has no gradient in every third step

# Placements of all parameters in a mesh of a shape; a vector's are those of its only dimension.
FSDP = ((-1,), (Shard(0),))
MESHES = {
    2: {"fsdp": FSDP, "tensor parallel": ((2,), (Shard(1),)), "replicated": ((2,), (Replicate(),))},
    4: {
        "fsdp": FSDP,
        "rows and columns": ((2, 2), (Shard(0), Shard(1))),
        "hsdp": ((2, 2), (Replicate(), Shard(0))),
        "twice by rows": ((2, 2), (Shard(0), Shard(0))),
    },
}
STOCHASTIC = {"rounding": "stochastic"}
EXACT: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "stochastic": {**STOCHASTIC, "state_dtype": BF16},
    "masters": {"master_weights": True},
    "int8": {**STOCHASTIC, "state_dtype": INT8},
    "int8 prior": {**STOCHASTIC, "codes": INT8},
    "decoupled": {"dtype": torch.float32, "prior_scaling": "decoupled"},
}


def values(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def make_prior(codes: torch.dtype | None = None) -> Prior:
    deltas: dict[str, Tensor | QuantizedDelta] = dict(values(1, BF16))
    del deltas["layers.0.input_layernorm.weight"]
    return Prior.from_mapping(
        {name: quantize(delta.float(), codes) if codes else delta for name, delta in deltas.items()}
    )


class Run:
    """Steps on gradients that the seed gives, of parameters as `place` shards them."""

    def __init__(self, mesh: Any = None, placements: tuple[Placement, ...] = (), **options: Any) -> None:
        self.mesh, self.placements = mesh, placements
        self.dtype = options.pop("dtype", BF16)
        self.params = {name: nn.Parameter(self.sharded(t)) for name, t in values(0, self.dtype).items()}
        options = {"prior": make_prior(options.pop("codes", None)), "prior_scaling": "absolute", "seed": 7} | options
        self.optimizer = FusedDriftAdamW(self.params.items(), lr=1e-2, alpha=0.3, **options)

    def sharded(self, tensor: Tensor) -> Tensor:
        if self.mesh is None:
            return tensor
        own = [Shard(min(p.dim, tensor.dim() - 1)) if isinstance(p, Shard) else p for p in self.placements]
        return distribute_tensor(tensor, self.mesh, own)

    def steps(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            for name, grad in values(100 + step, self.dtype).items():
                skipped = name == SKIPS and step % 3 == 2
                self.params[name].grad = None if skipped else self.sharded(grad)  # type: ignore[assignment]
            self.optimizer.step()

    def result(self) -> dict[str, Tensor]:
        return {name: whole(param.detach()) for name, param in self.params.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_runs(world: int, cases: dict[str, dict[str, Any]]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The parameters after 20 steps, by placement and case."""
    results = {}
    for label, (shape, placements) in MESHES[world].items():
        mesh = init_device_mesh("cpu", (world,) if shape == (-1,) else shape)
        for case, options in cases.items():
            run = Run(mesh, placements, **options)
            run.steps(0, 20)
            results[label, case] = run.result()
    return results


def alone(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    results = {}
    for case, options in cases.items():
        run = Run(**options)
        run.steps(0, 20)
        results[case] = run.result()
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_absolute_without_clipping_has_the_bits_of_one_process(world: int, tmp_path: Path) -> None:
    expected = alone(EXACT)
    for found in ranks.run(sharded_runs, world, tmp_path, world, EXACT):
        for (label, case), params in found.items():
            for name, param in params.items():
                if case == "int8" and name == CUT:
                    continue
                assert torch.equal(param, expected[case][name]), (label, case, name)


@pytest.mark.parametrize("world", [2, 4])
def test_all_scalings_and_clipping_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    """Sums over shards are added in another order: within 1e-6 of the largest weight after 20 steps."""
    cases = {
        f"{scaling}, {clip}": {"dtype": torch.float32, "prior_scaling": scaling, "max_grad_norm": clip}
        for scaling in SCALINGS
        for clip in (None, 1.0)
    }
    cases["normalized"] = {"dtype": torch.float32, "normalize_to_param": True}
    expected = alone(cases)
    for found in ranks.run(sharded_runs, world, tmp_path, world, cases):
        for (label, case), params in found.items():
            for name, param in params.items():
                error = (param - expected[case][name]).abs().max() / expected[case][name].abs().max()
                assert error <= 1e-6, (label, case, name, error)


# Parts of tensors


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """A shape and a part of it; many of its sizes are whole blocks of codes."""
    sizes = st.sampled_from([1, 2, 3, 8, 64, 128, 256, 384])
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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(boxes(), st.sampled_from([torch.float32, BF16, INT8, torch.float8_e4m3fn]))
def test_a_part_of_a_delta_is_that_part_of_the_whole(
    tmp_path: Path, case: tuple[tuple[int, ...], tuple[slice, ...]], dtype: torch.dtype
) -> None:
    """In memory and of a file, of which it reads no row beyond."""
    shape, box = case
    delta: Tensor | QuantizedDelta = torch.randn(shape)
    delta = quantize(delta, dtype) if dtype.itemsize == 1 else delta.to(dtype)
    tensors = {"w": delta} if isinstance(delta, Tensor) else {"w": delta.codes, "w.scales": delta.scales}
    save_file(tensors, tmp_path / "w.safetensors")
    stored = TensorFile.inspect(tmp_path / "w.safetensors").tensors
    in_memory = Prior.from_mapping({"w": delta})
    expected = in_memory.load("w")[box]
    for part in (
        in_memory.load_stored("w", box=box),
        StoredDelta(stored["w"], stored.get("w.scales")).read(box),
    ):
        found = part.expand() if isinstance(part, QuantizedDelta) else part
        assert found.is_contiguous()
        assert torch.equal(found, expected)


def damaged_prior(folder: Path) -> str:
    """Of which each rank reads a part, whose norm alone tells it nothing."""
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


# Gradients, checks, failures


def biased(mesh: Any, scaling: str) -> dict[str, Tensor]:
    run = Run(mesh, (Shard(0),))
    bias = GradientBias(run.params.items(), make_prior(), alpha=0.3, scaling=scaling)
    for step in range(3):
        for name, grad in values(100 + step, BF16).items():
            run.params[name].grad = run.sharded(grad)  # type: ignore[assignment]
        bias.apply_()
    return {name: whole(param.grad) for name, param in run.params.items() if param.grad is not None}


def biased_on_ranks(scaling: str) -> dict[str, Tensor]:
    return biased(init_device_mesh("cpu", (2,)), scaling)


@pytest.mark.parametrize("scaling", ["absolute", "gradnorm"])
def test_gradients_alone_are_biased_as_in_one_process(scaling: str, tmp_path: Path) -> None:
    """To a unit of bfloat16's last place where c follows from sums."""
    expected = biased(None, scaling)
    for found in ranks.run(biased_on_ranks, 2, tmp_path, scaling):
        for name, grad in found.items():
            tolerance = 0.0 if scaling == "absolute" else 2.0**-7
            torch.testing.assert_close(grad, expected[name], rtol=tolerance, atol=0, msg=name)


def partial_gradient() -> Tensor:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Replicate()]))
    param.grad = DTensor.from_local(torch.full((4, 3), 1.0 + mesh.get_rank()), mesh, [Partial()])
    FusedDriftAdamW([param], lr=0.1, weight_decay=0, max_grad_norm=6.0).step()
    return param.to_local().detach()


def test_a_gradient_that_is_a_partial_sum_is_summed(tmp_path: Path) -> None:
    alone = nn.Parameter(torch.zeros(4, 3))
    alone.grad = torch.full((4, 3), 3.0)
    FusedDriftAdamW([alone], lr=0.1, weight_decay=0, max_grad_norm=6.0).step()
    for found in ranks.run(partial_gradient, 2, tmp_path):
        assert torch.equal(found, alone.detach())


def fsdp1() -> str:
    model = FullyShardedDataParallel(nn.Linear(4, 4), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match=r"use torch.distributed.fsdp.fully_shard") as error:
        FusedDriftAdamW(model.named_parameters())
    return str(error.value)


def test_fsdp1_is_an_error_that_says_what_to_use(tmp_path: Path) -> None:
    assert "weight" in ranks.run(fsdp1, 2, tmp_path)[0]


def float32_states() -> dict[str, Tensor]:
    run = Run(init_device_mesh("cpu", (2,)), (Shard(0),), state_dtype=INT8)
    run.steps(0, 3)
    saved = run.optimizer.state_dict(dtype=torch.float32)
    other = Run(init_device_mesh("cpu", (2,)), (Shard(0),), dtype=torch.float32)
    other.optimizer.load_state_dict(saved)
    masters = Run(init_device_mesh("cpu", (2,)), (Shard(0),), master_weights=True)
    masters.steps(0, 3)
    name = next(iter(SHAPES))
    master = masters.optimizer.master_weight(masters.params[name])
    assert torch.equal(whole(master).to(BF16), whole(masters.params[name].detach()))
    return {name: whole(state["exp_avg_sq"]) for name, state in zip(SHAPES, saved["state"].values(), strict=True)}


def test_sharded_codes_are_saved_as_float32(tmp_path: Path) -> None:
    run = Run(state_dtype=INT8)
    run.steps(0, 3)
    expected = run.optimizer.state_dict(dtype=torch.float32)["state"].values()
    for found in ranks.run(float32_states, 2, tmp_path):
        for name, state in zip(SHAPES, expected, strict=True):
            assert name == CUT or torch.equal(found[name], state["exp_avg_sq"]), name


def a_rank_dies() -> float:
    run = Run(init_device_mesh("cpu", (2,)), (Shard(0),), prior_scaling="gradnorm")
    run.steps(0, 2)
    if run.mesh.get_rank() == 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)connection|peer|timed out"):
        run.optimizer.step()
    torch.save(time.monotonic() - start, "elapsed.pt")
    os._exit(0)


def test_a_rank_that_dies_leaves_the_others_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ranks").mkdir()
    with pytest.raises(FileNotFoundError):  # no rank returns
        ranks.run(a_rank_dies, 2, tmp_path / "ranks")
    assert torch.load(tmp_path / "elapsed.pt") < ranks.TIMEOUT.total_seconds()


# Memory

LAYERS, SIDE = 4, 4096  # of bfloat16: 32 MiB a layer


def binding_memory(folder: Path) -> float:
    """MiB above what there was before a prior is bound, at the most."""
    mesh = init_device_mesh("cpu", (2,))
    named = []
    for layer in range(LAYERS):
        own = torch.zeros(SIDE // 2, SIDE, dtype=BF16)
        param = nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False))
        named.append((f"layers.{layer}.mlp.up_proj.weight", param))
    optimizer = FusedDriftAdamW(named, prior=folder)
    binding = optimizer._binding
    assert binding is not None
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    bounds = binding.bind([(name, param.to_local(), Part.of(param)) for name, param in named])
    assert all(bound is not None and bound.delta.numel() == SIDE * SIDE // 2 for bound in bounds)
    return resident("VmHWM") - before


def resident(which: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which)]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts resident memory")
def test_binding_needs_the_ranks_share_and_one_tensor(tmp_path: Path) -> None:
    for role in ("expert", "base"):
        (tmp_path / role).mkdir()
        weights = {
            f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(SIDE, SIDE).to(BF16) for layer in range(LAYERS)
        }
        save_file(weights, tmp_path / role / "model.safetensors")
        (tmp_path / role / "config.json").write_text("{}")
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    share, one = LAYERS * SIDE * SIDE * 2 / 2**20 / 2, SIDE * SIDE * 2 / 2**20
    for found in ranks.run(binding_memory, 2, tmp_path, tmp_path / "prior"):
        assert found < share + one
