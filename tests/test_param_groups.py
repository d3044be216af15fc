"""Param groups in practice: frozen parameters of any kind, lists edited by hand, several dtypes together, a parameter
given twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from biasing import BACKENDS, BF16, DEVICE, F16, F32
from torch import Tensor, nn

from drift_kernels import FusedDriftAdamW, GradientBias, PriorError

BOTH = [torch.optim.AdamW, FusedDriftAdamW]
Params = dict[str, nn.Parameter]


# Parameters that do not concern it

FROZEN = {
    "uint8": torch.zeros(3, dtype=torch.uint8),
    "int8": torch.zeros(3, dtype=torch.int8),
    "float64": torch.zeros(3, dtype=torch.float64),
    "complex": torch.zeros(3, dtype=torch.complex64),
    "transposed": torch.zeros(3, 4).t(),
    "sparse": torch.eye(3).to_sparse(),
    "meta": torch.zeros(3, device="meta"),
    "float16": torch.zeros(3, dtype=torch.float16),
}


@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"backend": "cpu"}, {"rounding": "stochastic"}])
@pytest.mark.parametrize("kind", FROZEN)
def test_a_frozen_parameter_of_any_kind_is_ignored(kind: str, options: dict[str, Any]) -> None:
    frozen = nn.Parameter(FROZEN[kind], requires_grad=False)
    param, alone = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = FusedDriftAdamW([("frozen", frozen), ("w", param)], **options)
    optimizer.add_param_group({"params": [("more", nn.Parameter(FROZEN[kind], requires_grad=False))]})
    expected = FusedDriftAdamW([alone], **options)
    for _ in range(2):
        param.grad, alone.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        expected.step()
    assert torch.equal(param, alone)
    assert list(optimizer.state) == [param]
    again = FusedDriftAdamW([("frozen", frozen), ("w", param)], **options)
    again.add_param_group({"params": [("more", nn.Parameter(FROZEN[kind], requires_grad=False))]})
    again.load_state_dict(optimizer.state_dict())
    assert list(again.state) == [param]


def test_it_is_checked_when_it_has_a_gradient() -> None:
    thawed, other = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer = FusedDriftAdamW([("thawed", thawed), ("w", other)])
    thawed.requires_grad_(True)
    thawed.grad, other.grad = torch.ones(3, dtype=torch.float64), torch.ones(3)
    with pytest.raises(TypeError, match=r"parameter thawed has dtype torch\.float64; expected one of float32"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(other, torch.ones(3))


# Groups edited by hand


def unnamed(group: dict[str, Any]) -> None:
    del group["param_names"]


def too_few(group: dict[str, Any]) -> None:
    group["param_names"] = group["param_names"][:1]


def appended(group: dict[str, Any]) -> None:
    group["params"].append(nn.Parameter(torch.ones(4)))


def removed(group: dict[str, Any]) -> None:
    group["params"].pop()


EDITS = [unnamed, too_few, appended, removed]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("stepped", [False, True])
def test_a_group_edited_by_hand_steps_as_torchs_does(edit: Callable[[dict[str, Any]], None], stepped: bool) -> None:
    results = []
    for optimizer_class in BOTH:
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
        optimizer = optimizer_class([("a", params[0]), ("b", params[1])], lr=0.5)
        for _ in range(1 + stepped):
            for param in params:
                param.grad = torch.ones_like(param)
            if stepped:
                optimizer.step()
        edit(optimizer.param_groups[0])
        params = optimizer.param_groups[0]["params"]
        for gone in optimizer.state.keys() - set(params):
            del optimizer.state[gone]  # otherwise torch cannot make a state_dict
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        results.append([param.detach() for param in params])
        again = optimizer_class(copy.deepcopy(params), lr=0.5)
        again.load_state_dict(optimizer.state_dict())
        assert [float(state["step"]) for state in again.state.values()] == [
            float(state["step"]) for state in map(optimizer.state.get, params)
        ]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("stepped", [False, True])
def test_under_a_prior_an_edit_without_names_is_an_error(edit: Callable[..., None], stepped: bool) -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = FusedDriftAdamW([("a", params[0]), ("b", params[1])], prior={"a": torch.ones(3)})
    for _ in range(1 + stepped):
        for param in params:
            param.grad = torch.ones_like(param)
        if stepped:
            optimizer.step()
    before = [param.detach().clone() for param in params]
    edit(optimizer.param_groups[0])
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    if edit in (unnamed, too_few) and stepped:
        optimizer.load_state_dict(optimizer.state_dict())  # makes new plans
    words = "pass model.named_parameters" if edit is unnamed else r"names for \d parameters: add .*add_param_group"
    with pytest.raises(PriorError, match=words):
        optimizer.step()
    assert all(torch.equal(param, was) for param, was in zip(params, before, strict=True))


def test_a_parameter_appended_with_its_name_is_bound() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    prior = {"a": torch.ones(3), "b": torch.ones(3)}
    optimizer = FusedDriftAdamW([("a", first)], prior=prior, prior_scaling="absolute")
    optimizer.param_groups[0]["params"].append(second)
    optimizer.param_groups[0]["param_names"].append("b")
    first.grad, second.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    assert optimizer.prior_names == ["a", "b"]
    assert torch.equal(first, second)
    assert (second > 1).all()


# Several dtypes together

SHAPES = {"large": (67, 129), "norm": (7,), "row": (1, 300)}
OPTIONS: list[dict[str, Any]] = [
    {"rounding": "stochastic"},
    {"master_weights": True},
    {"rounding": "stochastic", "state_dtype": "int8"},
    {"master_weights": True, "state_dtype": "int8"},
    {"master_weights": True, "state_dtype": "bf16", "rounding": "stochastic"},
    {"state_dtype": "bf16", "rounding": "stochastic"},
]


def make(dtype: torch.dtype) -> Params:
    return {
        f"{name} {dtype}": nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for name, shape in SHAPES.items()
    }


def stepped(params: Params, grads: dict[str, Tensor], prior: dict[str, Tensor], **options: Any) -> FusedDriftAdamW:
    mine = {name: delta for name, delta in prior.items() if name in params}
    optimizer = FusedDriftAdamW(params.items(), lr=1e-3, prior=mine, prior_scaling="absolute", alpha=0.1, **options)
    for scale in (1.0, -0.5, 0.25):
        for name, param in params.items():
            param.grad = (scale * grads[name]).to(param.dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float32_parameters_need_neither_random_bits_nor_masters(options: dict[str, Any], backend: str) -> None:
    """Beside bfloat16 parameters, they are unaffected by the options, and the bfloat16 ones unaffected by them."""
    mixed = {**make(BF16), **make(F32)}
    grads = {name: torch.randn_like(param) for name, param in mixed.items()}
    deltas = {name: torch.randn_like(param) for name, param in mixed.items()}
    halves = [
        {name: nn.Parameter(param.detach().clone()) for name, param in mixed.items() if param.dtype == dtype}
        for dtype in (BF16, F32)
    ]
    ours = stepped(mixed, grads, deltas, seed=9, backend=backend, **options)
    plain = {"state_dtype": "int8"} if options.get("state_dtype") == "int8" else {}
    expected = [
        stepped(halves[0], grads, deltas, seed=9, backend=backend, **options),
        stepped(halves[1], grads, deltas, backend=backend, **plain),
    ]
    for half, optimizer in zip(halves, expected, strict=True):
        for name, param in half.items():
            assert torch.equal(mixed[name], param), name
            state = ours.state[mixed[name]]
            assert state.keys() == optimizer.state[param].keys()
            assert all(torch.equal(value, optimizer.state[param][key]) for key, value in state.items()), name


def test_a_mixed_run_resumes_and_has_masters_of_both() -> None:
    params = {**make(BF16), **make(F32)}
    grads = {name: torch.randn_like(param) for name, param in params.items()}
    options = {"master_weights": True, "state_dtype": "bf16", "rounding": "stochastic"}
    first = stepped(params, grads, {f"norm {F32}": torch.ones(7)}, **options)
    others = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    second = FusedDriftAdamW(others.items(), **options)
    saved = first.state_dict()
    for group in saved["param_groups"]:
        del group["prior_fingerprint"]
    second.load_state_dict(saved)
    for name, param in params.items():
        state = second.state[others[name]]
        assert all(torch.equal(value, state[key]) for key, value in first.state[param].items())
        master = first.master_weight(param)
        assert master.dtype == F32
        assert master.data_ptr() != param.data_ptr()
        assert torch.equal(master.to(param.dtype), param)
    first.refresh_masters()


# Gradients of other dtypes


def set_grad(param: nn.Parameter, grad: Tensor) -> None:
    if not hasattr(param, "grad_dtype"):
        pytest.skip("this torch takes no gradients of other dtypes")
    param.grad = None
    param.grad_dtype = grad.dtype
    param.grad = grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gradients_of_half_precision_for_float32_parameters(dtype: torch.dtype, backend: str) -> None:
    """Like the same gradients in float32: contiguous or not, some in float32, with statistics and clipping. Bitwise,
    except for the reference, whose sums depend on a tensor's alignment, and for the total of the tensors' sums: those
    with gradients of one dtype are added first."""
    tolerance = {"rtol": 1e-6, "atol": 0.0} if backend == "reference" else {"rtol": 0.0, "atol": 0.0}
    params, wide = make(F32), make(F32)
    options = {"prior": {f"large {F32}": torch.randn(67, 129)}, "max_grad_norm": 1.0, "lr": 1e-2, "backend": backend}
    for name, param in params.items():
        wide[name].data.copy_(param.data)
    ours, theirs = (FusedDriftAdamW(one.items(), **options) for one in (params, wide))
    for step in range(3):
        for name, param in params.items():
            grad = torch.randn(param.shape[::-1], device=DEVICE)
            grad = grad.to(dtype).t() if param.dim() == 2 else grad
            set_grad(param, grad if step else grad.float())
            wide[name].grad = grad.float()
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours.grad_norm, theirs.grad_norm, rtol=max(1e-15, tolerance["rtol"]), atol=0.0)
    for name, param in params.items():
        torch.testing.assert_close(param, wide[name], **tolerance)
    assert params[f"large {F32}"].grad.dtype == dtype


def test_they_are_biased_in_place() -> None:
    param, delta = nn.Parameter(torch.randn(9, 4)), torch.randn(9, 4)
    grad = torch.randn(9, 4).to(BF16)
    set_grad(param, grad.clone())
    GradientBias([("w", param)], {"w": delta}, prior_scaling="absolute").apply_()
    assert torch.equal(param.grad, (grad.float() - delta).to(BF16))


@pytest.mark.parametrize(("dtype", "of_grad"), [(F32, BF16), (BF16, F32)])
def test_they_are_used_in_the_backward_pass(dtype: torch.dtype, of_grad: torch.dtype) -> None:
    """From pass to pass they may change between two dtypes: the bits of `step()` on the same gradients."""
    params = [nn.Parameter(torch.randn(9, 4).to(dtype))]
    params.append(nn.Parameter(params[0].detach().clone()))
    ours, theirs = (FusedDriftAdamW([param]) for param in params)
    ours.attach_to_backward()
    for grad_dtype in (of_grad, dtype, of_grad):
        grad = torch.randn(9, 4)
        set_grad(params[0], torch.zeros(9, 4, dtype=grad_dtype))
        set_grad(params[1], grad.to(grad_dtype))
        params[0].grad = None
        (params[0] * grad).sum().backward()
        theirs.step()
    assert torch.equal(*params)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(ours.state[params[0]][key], theirs.state[params[1]][key]), key


@pytest.mark.parametrize(("dtype", "of_grad"), [(F16, BF16), (BF16, F16), (F32, torch.float64)])
def test_other_pairs_are_an_error_that_names_the_parameter(dtype: torch.dtype, of_grad: torch.dtype) -> None:
    param = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = FusedDriftAdamW([("w", param)])
    set_grad(param, torch.ones(3, dtype=of_grad))
    with pytest.raises(
        TypeError, match=rf"gradient of parameter w has dtype {of_grad}; expected .* for a {dtype} parameter"
    ):
        optimizer.step()
    assert not optimizer.state


# A parameter given twice


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_a_parameter_given_twice_is_counted_as_torch_counts_it(options: dict[str, Any], backend: str) -> None:
    """A warning, and two updates, one after the other."""
    results = []
    torch.manual_seed(5)
    start, grads = torch.randn(2, 50, device=DEVICE), torch.randn(3, 2, 50, device=DEVICE)
    for optimizer_class in BOTH:
        twice, once = (nn.Parameter(row.clone()) for row in start)
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = (
                torch.optim.AdamW([twice, once, twice], lr=1e-2, foreach=False)
                if optimizer_class is torch.optim.AdamW
                else FusedDriftAdamW([twice, once, twice], lr=1e-2, backend=backend, **options)
            )
        for grad in grads:
            twice.grad, once.grad = grad.clone()
            optimizer.step()
        assert (float(optimizer.state[twice]["step"]), float(optimizer.state[once]["step"])) == (6.0, 3.0)
        results.append(torch.stack([twice.detach(), once.detach()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_parameter_in_two_groups_is_an_error_as_in_torch() -> None:
    param = nn.Parameter(torch.ones(3))
    for optimizer_class in BOTH:
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer_class([{"params": [param]}, {"params": [param]}])


def test_a_parameter_given_twice_cannot_step_in_the_backward_pass() -> None:
    param = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = FusedDriftAdamW([param, param])
    with pytest.raises(ValueError, match="passed twice"):
        optimizer.attach_to_backward()
