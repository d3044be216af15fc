"""Coefficients that a kernel fills, against coefficients.py, bit for bit; and how many launches a step is.

The kernel runs on the host (grid.py), as the backend that the cuda backend is: two optimizers on equal models, one of
which takes the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import grid
import pytest
import torch
from problems import BF16, DEVICE, F32, GRID, assert_same_bits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from drift_kernels import FusedDriftAdamW, GradientBias
from drift_kernels.engine.launches import DeviceBatch
from drift_kernels.kernels import backends, counts
from drift_kernels.kernels.coefficients import CoefficientTable, GradScale, Hyperparameters, OrderedSum
from drift_kernels.kernels.filling import MAX_GROUPS, Filling
from drift_kernels.kernels.scalings import SCALINGS, Scaling
from drift_kernels.sharding import Reduction

pytestmark = pytest.mark.skipif(
    grid.unavailable(DEVICE) is not None, reason="the kernels run on the host, where there is a C++ compiler"
)
begin = grid.begin

Params = dict[str, nn.Parameter]
SHAPES = {"layers.0.weight": (33, 65), "layers.1.weight": (3, 17), "layers.1.bias": (33,), "norm.weight": (7,)}
UNKNOWN = ("norm.weight",)  # to the prior


@pytest.fixture(autouse=True)
def on_grid(monkeypatch: pytest.MonkeyPatch) -> Any:
    """ "auto" takes the kernels on the host."""
    monkeypatch.setitem(backends.AUTO, DEVICE.type, (GRID,))
    backends.resolve.cache_clear()
    yield
    backends.resolve.cache_clear()


def random_between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def models(shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = F32) -> tuple[Params, Params]:
    values = {name: torch.randn(shape, device=DEVICE).to(dtype) for name, shape in shapes.items()}
    first, second = ({name: nn.Parameter(value.clone()) for name, value in values.items()} for _ in range(2))
    return first, second


def deltas_of(params: Params) -> dict[str, Tensor]:
    return {name: torch.randn_like(p) * 0.1 for name, p in params.items() if name not in UNKNOWN}


def random_groups(params: Params) -> list[dict[str, Any]]:
    """A group for every two parameters, each with hyperparameters of its own."""
    named, groups = list(params.items()), []
    for index in range(0, len(named), 2):
        group = {
            "lr": random_between(0, 1e-1),
            "betas": (random_between(0.0, 0.99), random_between(0.9, 0.9999)),
            "eps": 10 ** random_between(-12, -6),
            "weight_decay": random_between(0, 0.2),
            "maximize": index % 4 == 0,
            "alpha": random_between(-1, 1),
            "normalize_to_param": index % 4 == 2,
        }
        groups.append(group | {"params": named[index : index + 2]})
    return groups


class Pair:
    """The same steps with coefficients that the kernel fills, and with those of coefficients.py."""

    def __init__(self, models: tuple[Params, Params], groups: Callable[[Params], list[Any]], **options: Any) -> None:
        self.models = models
        self.optimizers = []
        made = groups(models[0])
        for params in models:
            own = [{**group, "params": [(name, params[name]) for name, _ in group["params"]]} for group in made]
            self.optimizers.append(FusedDriftAdamW(own, **options))

    def step(self, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Params], None] = lambda params: None) -> None:
        for p in self.models[0].values():
            p.grad = torch.randn_like(p) * 0.3
        spoil(self.models[0])
        for name, p in self.models[1].items():
            grad = self.models[0][name].grad
            p.grad = None if grad is None else grad.clone()
        for fills, optimizer in zip((True, False), self.optimizers, strict=True):
            monkeypatch.setattr(grid, "FILLS_COEFFICIENTS", fills)
            optimizer.step()
        self.compare()

    def compare(self) -> None:
        first, second = self.optimizers
        tables, figures = [], []
        for optimizer in self.optimizers:
            batches = optimizer._engine.batches
            tables.append([batch.coefficients.table for batch in batches])
            figures.append([optimizer.grad_norm, optimizer.prior_cosine, optimizer.prior_ratio])
            for batch in batches:
                figures[-1].append(batch.coefficients.steps.clone())
        assert_same_bits(*tables)
        for one, other in zip(*figures, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        params = [list(model.values()) for model in self.models]
        assert_same_bits([p.detach() for p in params[0]], [p.detach() for p in params[1]])
        for one, other in zip(*params, strict=True):
            for key, value in first.state[one].items():
                assert_same_bits([value.float()], [second.state[other][key].float()])


def fills(monkeypatch: pytest.MonkeyPatch) -> list[Filling]:
    """Those that the kernel is given from now on."""
    given: list[Filling] = []
    original = grid.fill_coefficients
    monkeypatch.setattr(grid, "fill_coefficients", lambda filling: (given.append(filling), original(filling))[1])
    return given


@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6, math.inf])
@pytest.mark.parametrize("scaling", [*SCALINGS, "any"])
def test_it_is_coefficients_py_bit_for_bit(
    scaling: str, max_grad_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hyperparameters that change, alpha by pattern, gradients that are zero, infinite or not there; and a mode that is
    nothing but another line of scalings.py."""
    monkeypatch.setitem(SCALINGS, "any", Scaling(*(random_between(-1, 1) for _ in Scaling._fields)))
    pair = Pair(
        both := models(),
        random_groups,
        prior=deltas_of(both[0]),
        prior_scaling=scaling,
        max_grad_norm=max_grad_norm,
    )
    given = fills(monkeypatch)
    special = {2: 0.0, 4: math.inf, 5: math.nan}
    for step in range(7):

        def spoil(params: Params, step: int = step) -> None:
            if step in special:
                params["layers.1.weight"].grad[0, 3] = special[step]
                if special[step] == 0.0:
                    params["layers.1.weight"].grad.zero_()
            if step == 3:
                params["layers.1.bias"].grad = None

        if step == 1:
            for group, other in zip(*(o.param_groups for o in pair.optimizers), strict=True):
                group["lr"] = other["lr"] = random_between(0, 0.1)
                group["betas"] = other["betas"] = (random_between(0, 0.9), 0.99)
                group["alpha"] = other["alpha"] = random_between(-1, 1)
        pair.step(monkeypatch, spoil)
    assert len(given) == 7


def test_alpha_by_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    both = models()
    alpha = {"re:weight": 0.7, "re:bias": -0.3}
    pair = Pair(both, lambda params: [{"params": list(params.items())}], prior=deltas_of(both[0]), alpha=alpha)
    for _ in range(3):
        pair.step(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tensors_are_read_by_the_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    both = models()
    lr, alpha = (torch.tensor(value, dtype=dtype, device=DEVICE) for value in (0.01, 0.3))
    common = {"prior": deltas_of(both[0]), "lr": lr, "alpha": alpha, "capturable": True, "max_grad_norm": 0.7}
    pair = Pair(both, lambda params: [{"params": list(params.items())}], **common)
    for _ in range(3):
        pair.step(monkeypatch)
        lr.mul_(0.7)
        alpha.mul_(-0.9)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_under_a_grad_scaler(scaling: str, max_grad_norm: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that are no power of two, in float32 and as numbers; steps that are not taken, the first among them."""
    both = models()
    pair = Pair(both, random_groups, prior=deltas_of(both[0]), prior_scaling=scaling, max_grad_norm=max_grad_norm)
    for skipped in (1.0, 0.0, 0.0, math.nan, 0.0):
        scale = random_between(1, 1000)
        for optimizer in pair.optimizers:
            optimizer.grad_scale = torch.tensor([scale], device=DEVICE)
            optimizer.found_inf = torch.tensor(skipped, device=DEVICE)
        pair.step(monkeypatch)
    counts = {float(state["step"]) for state in pair.optimizers[0].state.values()}
    assert counts == {3.0}


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_several_plans_of_which_some_need_no_sums(max_grad_norm: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not measured any more is zero: the scaling of one plan's group changes."""
    first, second = models()
    for params in (first, second):
        params["layers.1.weight"].data = params["layers.1.weight"].data.to(BF16)

    def groups(params: Params) -> list[dict[str, Any]]:
        named = list(params.items())
        return [{"params": named[:1]}, {"params": named[1:2]}, {"params": named[2:], "prior_scaling": "absolute"}]

    options = {"prior": deltas_of(first), "alpha": 0.4, "max_grad_norm": max_grad_norm}
    pair = Pair((first, second), groups, **options, prior_scaling="adaptive_cosine")
    for scaling in ("adaptive_cosine", "absolute", "decoupled", "gradnorm", "gradnorm"):
        for optimizer in pair.optimizers:
            optimizer.param_groups[1]["prior_scaling"] = scaling
        pair.step(monkeypatch)
    (batch,) = pair.optimizers[0]._engine.batches
    assert len(batch.launches) > 1


def test_both_ways_in_turn_are_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that goes over from one to the other at any step, while hyperparameters change back and forth."""
    both = models()
    pair = Pair(both, random_groups, prior=deltas_of(both[0]), max_grad_norm=0.5)
    original, turns = DeviceBatch.can_fill, [True, False, False, True, True, False, True]
    for step, turn in enumerate(turns):
        monkeypatch.setattr(DeviceBatch, "can_fill", lambda self, groups, turn=turn: turn and original(self, groups))
        for optimizer in pair.optimizers:
            for group in optimizer.param_groups:
                group["betas"] = (0.9, 0.99) if step % 2 else (0.8, 0.999)
        pair.step(monkeypatch)


def test_counts_on_the_host_have_a_copy_that_follows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the kernel counts too: until a user, or coefficients.py, writes other counts."""
    monkeypatch.setattr(Filling, "_is_elsewhere", staticmethod(lambda table: True))
    both = models()
    pair = Pair(both, random_groups, prior=deltas_of(both[0]))
    for step in range(6):
        if step == 3:
            for optimizer, params in zip(pair.optimizers, both, strict=True):
                optimizer.state[params["layers.1.bias"]]["step"].fill_(70_000)
        pair.step(monkeypatch)
        (batch,) = pair.optimizers[0]._engine.batches
        assert torch.equal(batch._filling._steps, batch.coefficients.steps)
        assert batch._filling._steps.data_ptr() != batch.coefficients.steps.data_ptr()


def test_all_reduced_between_the_first_launch_and_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a second rank had the same sums."""
    both = models()
    launches = []

    def sum_(self: Reduction, values: Tensor) -> None:
        launches.append(grid.launched().value)
        values.mul_(2)

    monkeypatch.setattr(Reduction, "sum_", sum_)
    pair = Pair(both, random_groups, prior=deltas_of(both[0]), max_grad_norm=0.5)
    for _ in range(3):
        before = grid.launched().value
        pair.step(monkeypatch)
        # Of two plans: sums of each, one launch for coefficients (or none), an update of each.
        assert launches == [before + 2, before + 5 + 2]
        launches.clear()


def test_the_bias_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    both = models()
    deltas, given = deltas_of(both[0]), fills(monkeypatch)
    for scaling in ("absolute", "gradnorm", "adaptive_cosine"):
        biases = [GradientBias(params.items(), deltas, prior_scaling=scaling, alpha=0.3) for params in both]
        for _ in range(2):
            grads = {name: torch.randn_like(p) for name, p in both[0].items()}
            found = []
            for params, bias, filled in zip(both, biases, (True, False), strict=True):
                for name, p in params.items():
                    p.grad = grads[name].clone()
                monkeypatch.setattr(grid, "FILLS_COEFFICIENTS", filled)
                found.append(bias.apply_())
            assert_same_bits(*([p.grad for p in params.values()] for params in both))
            if scaling != "absolute":
                assert torch.equal(found[0].cosine, found[1].cosine)
                assert torch.equal(found[0].ratio, found[1].ratio)
    assert len(given) == 6


# Where the kernel is not asked


def test_more_groups_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = fills(monkeypatch)
    for count in (MAX_GROUPS, MAX_GROUPS + 1):
        both = models({f"layers.{index}.weight": (3,) for index in range(count)})
        pair = Pair(both, lambda params: [{"params": [each], "lr": 1e-3 * i} for i, each in enumerate(params.items())])
        pair.step(monkeypatch)
        assert len(given) == 1


@pytest.mark.parametrize(("max_grad_norm", "expected"), [(None, 2), (0.5, 0)])
def test_a_norm_over_several_batches(
    max_grad_norm: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter that is given twice steps twice, in batches of their own."""
    both, given = models(), fills(monkeypatch)

    def twice(params: Params) -> list[dict[str, Any]]:
        named = list(params.items())
        return [{"params": [*named, named[0]]}]

    with pytest.warns(UserWarning, match="duplicate parameters"):
        pair = Pair(both, twice, max_grad_norm=max_grad_norm)
    for step in range(1, 4):
        pair.step(monkeypatch)
        assert len(given) == step * expected


# What a step is made of

# Of torch's operations, those that launch nothing.
NOTHING = {
    *("alias", "as_strided", "detach", "expand", "select", "slice", "split", "t", "unbind", "view"),
    *("empty", "empty_like", "empty_strided"),
    *("_record_function_enter_new", "_record_function_exit"),
}


class Operations(TorchDispatchMode):
    """The operations that a device would have run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in NOTHING:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize(
    ("scaling", "max_grad_norm", "plans", "expected"),
    [
        *(("adaptive_cosine", 0.5, 1, 3), ("adaptive_cosine", None, 1, 3)),
        *(("absolute", 0.5, 1, 3), ("absolute", None, 1, 2)),
        *(("adaptive_cosine", 0.5, 2, 5), ("adaptive_cosine", None, 2, 4), ("absolute", None, 2, 3)),
    ],
)
def test_a_step_is_two_or_three_launches_and_nothing_else(
    scaling: str, max_grad_norm: float | None, plans: int, expected: int, capturable: bool
) -> None:
    """For one plan; of several each has its update, and its sums where it needs them. With several groups, a learning
    rate that changes in every step, a GradScaler."""
    params, _ = models({name: shape for name, shape in SHAPES.items() if plans == 2 or name not in UNKNOWN})
    options = {"prior": deltas_of(params), "prior_scaling": scaling, "max_grad_norm": max_grad_norm}
    if capturable:
        options |= {key: torch.tensor(0.01, device=DEVICE) for key in ("lr", "alpha")}
    ours = FusedDriftAdamW(
        [{"params": list(params.items())[:1]}, {"params": list(params.items())[1:], "weight_decay": 0.2}],
        capturable=capturable,
        **options,
    )
    for step in range(4):
        for p in params.values():
            p.grad = torch.randn_like(p)
        if not capturable:
            ours.param_groups[1]["lr"] = 1e-3 / (step + 1)
        elif step > 0:
            ours.grad_scale, ours.found_inf = torch.tensor(3.0), torch.tensor(0.0)
        before = grid.launched().value
        with Operations() as operations:
            ours.step()
        if step > 1:  # the first makes the plans; the second, under the first scaler, anew
            assert operations.names == []
            assert grid.launched().value - before == expected


def test_a_step_without_the_kernel_is_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count above counts."""
    monkeypatch.setattr(grid, "FILLS_COEFFICIENTS", False)
    params, _ = models()
    ours = FusedDriftAdamW(params.items(), prior=deltas_of(params), max_grad_norm=0.5, prior_scaling="adaptive_cosine")
    for _ in range(2):
        for p in params.values():
            p.grad = torch.randn_like(p)
        with Operations() as operations:
            ours.step()
    assert len(operations.names) > 30


# What coefficients.py and the kernel share


def test_powers_are_the_same_as_numbers_as_vectors_and_in_the_kernel() -> None:
    some = [0, 1, 2, 3, 7, 8, 255, 256, 257, 999, 65_535, 65_536, 10**6, 2**24 - 1, 2**24]
    some += torch.randint(2**24, (700,)).tolist()
    n = len(some)
    betas = torch.rand(2, n, dtype=torch.float64)
    betas[1] = 1 - 10 ** (-6 * betas[1])
    steps = torch.tensor(some, dtype=F32)
    powered = counts.powers(counts.squares(betas), steps)
    for beta, found in zip(betas, powered, strict=True):
        for b, t, value in zip(beta.tolist(), some, found.tolist(), strict=True):
            assert counts.power(b, t) == value
            if t < 300:
                exact = Fraction(b) ** t
                assert abs(Fraction(value) - exact) <= exact * Fraction(t, 2**52), (b, t)

    table = CoefficientTable(torch.device("cpu"), steps - 1, [0.0] * n, [0.0] * n)
    other = CoefficientTable(torch.device("cpu"), steps - 1, [0.0] * n, [0.0] * n)
    groups = []
    for row in range(n):
        h = Hyperparameters(0.1, *betas[:, row].tolist(), 1e-8, 0.1, False, 0.0, "absolute", False)
        table.set_hyperparameters(slice(row, row + 1), h)
        groups.append(h)
    table.advance()
    table.set_gradient_coefficients(table.bias(with_stats=False), None)
    found = torch.empty_like(other.table)
    for first in range(0, n, MAX_GROUPS):
        some_groups = groups[first : first + MAX_GROUPS]
        other = CoefficientTable(torch.device("cpu"), steps - 1, [0.0] * n, [0.0] * n)
        group_of = [min(max(row - first, 0), len(some_groups) - 1) for row in range(n)]
        filling = Filling(other, group_of)
        filling.prepare(some_groups, GradScale(None, None), advances=True, with_stats=False, max_grad_norm=None)
        grid.fill_coefficients(filling)
        found[first : first + MAX_GROUPS] = other.table[first : first + MAX_GROUPS]
    assert_same_bits([found], [table.table])


@pytest.mark.parametrize("n", [1, 2, 3, 255, 511, 512, 513, 1700])
def test_the_order_of_a_sum(n: int) -> None:
    numbers = torch.randn(n, dtype=torch.float64) * 10 ** torch.linspace(-8, 8, n, dtype=torch.float64)
    ordered = OrderedSum(n, DEVICE)
    for _ in range(2):  # it can be filled again
        ordered.addends.copy_(numbers)
        lanes = [0.0] * 512
        for row, number in enumerate(numbers.tolist()):
            lanes[row % 512] += number
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [lanes[lane] + lanes[lane + half] for lane in range(half)]
        assert float(ordered.total()) == lanes[0]
