"""Sharded parameters (DTensors) in real processes, compared with the same run in one process."""

from __future__ import annotations

import math
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from drift_kernels import FusedDriftAdamW, GradientBias, attach_prior
from drift_kernels.kernels.scalings import SCALINGS
from drift_kernels.prior import Prior, QuantizedDelta, quantize

BF16, INT8 = torch.bfloat16, torch.int8

# Rows of whole blocks, of partial ones, of an odd number of elements; fewer rows, or fewer elements, than ranks.
SHAPES = {
    "layers.0.mlp.up_proj.weight": (33, 256),
    "layers.0.mlp.down_proj.weight": (64, 136),
    "layers.0.self_attn.q_proj.weight": (37, 31),
    "layers.0.self_attn.k_proj.weight": (3, 1024),
    "layers.0.self_attn.k_proj.bias": (3,),
    "layers.0.input_layernorm.weight": (66,),
}
CUT = "layers.0.mlp.down_proj.weight"  # sharding may cut its blocks of codes; it then has float32 states
SKIPS = "layers.0.self_attn.q_proj.weight"  # has no gradient in every third step

# The mesh shape and the placements of all parameters; for a vector, those of its only dimension.
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


def sharded(tensor: Tensor, mesh: Any, placements: tuple[Placement, ...]) -> Tensor:
    if mesh is None:
        return tensor
    own = [Shard(min(p.dim, tensor.dim() - 1)) if isinstance(p, Shard) else p for p in placements]
    return distribute_tensor(tensor, mesh, own)


@cache
def gradients(step: int, dtype: torch.dtype, mesh: Any, placements: tuple[Placement, ...]) -> dict[str, Tensor]:
    """Scatter the gradients once for all runs, since this takes longer than the steps; each step gets a copy."""
    return {name: sharded(grad, mesh, placements) for name, grad in values(100 + step, dtype).items()}


class Run:
    """Steps of parameters sharded by `place`, on gradients determined by the seed."""

    def __init__(self, mesh: Any = None, placements: tuple[Placement, ...] = (), **options: Any) -> None:
        self.mesh, self.placements = mesh, placements
        self.dtype = options.pop("dtype", BF16)
        self.params = {name: nn.Parameter(sharded(t, mesh, placements)) for name, t in values(0, self.dtype).items()}
        options = {"prior": make_prior(options.pop("codes", None)), "prior_scaling": "absolute", "seed": 7} | options
        self.optimizer = FusedDriftAdamW(self.params.items(), lr=1e-2, alpha=0.3, **options)

    def steps(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            for name, grad in gradients(step, self.dtype, self.mesh, self.placements).items():
                skipped = name == SKIPS and step % 3 == 2
                self.params[name].grad = None if skipped else grad.clone()
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
    """Within 1e-6 of the largest weight after 20 steps: sums over shards are added in another order."""
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


# Gradients, checks, failures


def biased(mesh: Any, scaling: str) -> dict[str, Tensor]:
    run = Run(mesh, (Shard(0),))
    bias = GradientBias(run.params.items(), make_prior(), alpha=0.3, prior_scaling=scaling)
    for step in range(3):
        for name, grad in gradients(step, BF16, run.mesh, run.placements).items():
            run.params[name].grad = grad.clone()
        bias.apply_()
    return {name: whole(param.grad) for name, param in run.params.items() if param.grad is not None}


def biased_on_ranks(scaling: str) -> dict[str, Tensor]:
    return biased(init_device_mesh("cpu", (2,)), scaling)


@pytest.mark.parametrize("scaling", ["absolute", "gradnorm"])
def test_gradients_alone_are_biased_as_in_one_process(scaling: str, tmp_path: Path) -> None:
    """Within one bfloat16 ulp if c depends on sums."""
    expected = biased(None, scaling)
    for found in ranks.run(biased_on_ranks, 2, tmp_path, scaling):
        for name, grad in found.items():
            tolerance = 0.0 if scaling == "absolute" else 2.0**-7
            torch.testing.assert_close(grad, expected[name], rtol=tolerance, atol=0, msg=name)


def summands(seed: int) -> Tensor:
    """[step, rank, 4, 3]: what each of two ranks adds to the gradient."""
    return torch.randn(3, 2, 4, 3, generator=torch.Generator().manual_seed(seed))


def stepped_and_biased(param: nn.Parameter, grads: list[Tensor]) -> tuple[Tensor, Tensor, float]:
    """The parameter after steps whose eps is far above the gradients, so that each is in proportion to its gradient;
    the last gradient, biased; and its norm."""
    optimizer = FusedDriftAdamW([param], lr=1.0, eps=100.0, weight_decay=0.0, max_grad_norm=math.inf)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    assert optimizer.grad_norm is not None
    GradientBias([("w", param)], {"w": torch.ones(4, 3)}, alpha=0.5, prior_scaling="absolute").apply_()
    assert param.grad is not None
    return whole(param.detach()), whole(param.grad), float(optimizer.grad_norm)


def partial_gradients(seed: int, placement: Placement) -> tuple[Tensor, Tensor, float]:
    mesh = init_device_mesh("cpu", (2,))
    own = summands(seed)[:, mesh.get_rank()]
    param = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [placement]))
    return stepped_and_biased(param, [DTensor.from_local(grad, mesh, [Partial()]) for grad in own])


@pytest.mark.parametrize("placement", [Replicate(), Shard(0)], ids=str)
def test_a_gradient_that_is_a_partial_sum_is_summed(placement: Placement, tmp_path: Path, seed: int) -> None:
    """A sum of two has no order: the bits of one process; the norm, added up over shards, to 1e-6."""
    param, grad, norm = stepped_and_biased(nn.Parameter(torch.zeros(4, 3)), list(summands(seed).sum(1)))
    for found in ranks.run(partial_gradients, 2, tmp_path, seed, placement):
        assert torch.equal(found[0], param)
        assert torch.equal(found[1], grad)
        assert math.isclose(found[2], norm, rel_tol=1e-6)


def refused() -> None:
    """What would act on gradients before they are reduced; and a parameter that is a partial sum."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="supports a single process only"):
        FusedDriftAdamW([shard]).attach_to_backward()
    with pytest.raises(TypeError, match="hooks do not support DTensors, got parameter w: use GradientBias"):
        attach_prior(nn.ParameterDict({"w": shard}), {"w": torch.ones(4, 3)})
    plain = FusedDriftAdamW([nn.Parameter(torch.zeros(3))])
    if mesh.size() == 1:
        plain.attach_to_backward()
    else:
        with pytest.raises(ValueError, match="supports a single process only"):
            plain.attach_to_backward()
    partial = nn.Parameter(DTensor.from_local(torch.zeros(4, 3), mesh, [Partial()]))
    partial.grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    with pytest.raises(ValueError, match="a partial sum cannot be updated"):
        FusedDriftAdamW([partial]).step()
    assert not partial.to_local().any()


@pytest.mark.parametrize("world", [1, 2])
def test_what_shards_cannot_have_is_refused(world: int, tmp_path: Path) -> None:
    ranks.run(refused, world, tmp_path)


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
    coded = {name: "exp_avg_codes" in run.optimizer.state[param] for name, param in run.params.items()}
    assert {name for name in SHAPES if not coded[name]} == {CUT, *(n for n in SHAPES if math.prod(SHAPES[n]) < 4096)}
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
    with pytest.raises(RuntimeError, match=r"(?i)connection|peer|broken pipe|timed out"):
        run.optimizer.step()
    torch.save(time.monotonic() - start, "elapsed.pt")
    os._exit(0)


def test_a_rank_that_dies_leaves_the_others_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ranks").mkdir()
    with pytest.raises(FileNotFoundError):  # no rank returns
        ranks.run(a_rank_dies, 2, tmp_path / "ranks")
    assert torch.load(tmp_path / "elapsed.pt") < ranks.TIMEOUT.total_seconds()


def loaded_both_ways() -> dict[tuple[str, bool], dict[str, Tensor]]:
    """Take three steps on plain parameters, then three on shards; and the other way round."""
    results = {}
    for case in ("stochastic", "masters"):
        for from_plain in (True, False):
            runs = [Run(**EXACT[case]), Run(init_device_mesh("cpu", (2,)), (Shard(0),), **EXACT[case])]
            first, second = runs if from_plain else reversed(runs)
            first.steps(0, 3)
            for name, param in first.params.items():
                second.params[name].data.copy_(sharded(whole(param.detach()), second.mesh, second.placements))
            second.optimizer.load_state_dict(first.optimizer.state_dict())
            second.steps(3, 6)
            results[case, from_plain] = second.result()
    return results


def test_states_go_from_plain_parameters_to_shards_and_back(tmp_path: Path) -> None:
    for found in ranks.run(loaded_both_ways, 2, tmp_path):
        for (case, from_plain), params in found.items():
            run = Run(**EXACT[case])
            run.steps(0, 6)
            for name, param in run.result().items():
                assert torch.equal(params[name], param), (case, from_plain, name)
