"""A tensor that does not match its plan never reaches a kernel: if torch.optim.AdamW works, so does our optimizer;
otherwise an error names the parameter, and nothing has changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from drift_kernels import FusedDriftAdamW, GradientBias
from drift_kernels.kernels import describe

SHAPE = (100, 64)
BACKENDS = ["cpu", "reference"]


@pytest.fixture(params=["compiled", "by getters"], autouse=True)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inspect tensors through DLPack's exchange API, or with Python's getters if there is none."""
    if request.param == "by getters":
        monkeypatch.setattr(describe, "_compiled", False)
    elif not describe._compiled:
        pytest.skip("this torch has no exchange API, or there was no compiler")


def stepped(count: int = 3, steps: int = 1, **options: Any) -> tuple[list[nn.Parameter], FusedDriftAdamW]:
    """Parameters after some steps."""
    params = [nn.Parameter(torch.randn(SHAPE)) for _ in range(count)]
    optimizer = FusedDriftAdamW([(f"layer{i}.weight", p) for i, p in enumerate(params)], lr=0.1, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(SHAPE)
        optimizer.step()
    return params, optimizer


def raises_and_changes_nothing(
    params: list[nn.Parameter], optimizer: FusedDriftAdamW, error: type[Exception], words: str
) -> None:
    before = copy.deepcopy([(p.detach(), optimizer.state[p]) for p in params if p.data_ptr()])
    with pytest.raises(error, match=words):
        optimizer.step()
    after = [(p.detach(), optimizer.state[p]) for p in params if p.data_ptr()]
    for (p, state), (q, other) in zip(after, before, strict=True):
        assert torch.equal(p, q)
        assert state.keys() == other.keys()
        for key in state:
            assert torch.equal(state[key], other[key]), key


# Parameters


@pytest.mark.parametrize("rows", [120, 80])
def test_a_parameter_of_another_size(rows: int) -> None:
    """As after `resize_token_embeddings`, which keeps the Parameter and sets its data."""
    params, optimizer = stepped()
    params[1].data = torch.zeros(rows, 64)
    params[1].grad = torch.ones(rows, 64)
    raises_and_changes_nothing(params, optimizer, ValueError, r"state exp_avg of parameter layer1.weight has shape")


def test_a_parameter_that_is_cut_in_place_changes_nothing_behind_it() -> None:
    params, optimizer = stepped()
    whole = params[1].data
    params[1].data = whole[:80]
    params[1].grad = torch.ones(80, 64)
    behind = whole[80:].clone()
    raises_and_changes_nothing(params, optimizer, ValueError, "parameter layer1.weight has shape")
    assert torch.equal(whole[80:], behind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", ["transposed", "channels last", "columns of a larger one"])
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"max_grad_norm": 1.0}], ids=str)
def test_a_parameter_that_is_not_contiguous_is_stepped_as_one_that_is(
    make: str, options: dict[str, Any], backend: str
) -> None:
    """Bitwise, with a prior, also after the user has written to it; and nothing outside of it is written."""
    dense = torch.randn(64, 8, 3, 5)
    larger = torch.full((64, 8, 3, 9), 7.0)
    data = {
        "transposed": lambda: dense.transpose(0, 1).contiguous().transpose(0, 1),
        "channels last": lambda: dense.contiguous(memory_format=torch.channels_last),
        "columns of a larger one": lambda: larger[..., 2:7].copy_(dense),
    }[make]()
    ours, theirs = nn.Parameter(data), nn.Parameter(dense.clone())
    assert not ours.is_contiguous()
    delta = {"a.weight": torch.randn_like(dense)}
    common = {"lr": 0.1, "prior": delta, "prior_scaling": "absolute", "backend": backend, **options}
    one, other = (FusedDriftAdamW([("a.weight", p)], **common) for p in (ours, theirs))
    strides = ours.stride()
    for step in range(3):
        grad = torch.randn_like(dense)
        ours.grad = grad.clone(memory_format=torch.channels_last) if step == 1 else grad.clone()
        theirs.grad = grad.clone()
        if step == 2:
            for p in (ours, theirs):
                p.detach().mul_(0.5)
        one.step()
        other.step()
        assert torch.equal(ours, theirs)
    assert ours.stride() == strides
    assert bool((larger[..., :2] == 7).all())
    assert bool((larger[..., 7:] == 7).all())


def test_a_square_parameter_that_is_transposed_in_place() -> None:
    """It has the same address and shape as before, and others are not contiguous either."""
    square, other = nn.Parameter(torch.randn(40, 40)), nn.Parameter(torch.randn(8, 6).t())
    optimizer = FusedDriftAdamW([square, other], lr=0.1)
    same = [nn.Parameter(square.detach().clone()), nn.Parameter(other.detach().clone())]
    theirs = torch.optim.AdamW(same, lr=0.1)
    for step in range(3):
        if step == 1:
            square.data, same[0].data = square.data.t(), same[0].data.t()
        for p, q in zip((square, other), same, strict=True):
            grad = torch.randn(p.shape)
            p.grad, q.grad = grad.clone(), grad.clone()
        optimizer.step()
        theirs.step()
        for p, q in zip((square, other), same, strict=True):
            torch.testing.assert_close(p, q)


def test_an_expanded_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 is expanded: several of its.*contiguous\(\)"):
        FusedDriftAdamW([nn.Parameter(torch.zeros(1, 4).expand(3, 4))])


class Wrapper(torch.Tensor):
    """A tensor that wraps another one and has no memory, like those of quantisation libraries."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = [a.inner if isinstance(a, Wrapper) else a for a in args]
        result = function(*unwrapped, **(kwargs or {}))
        return Wrapper(result) if function is torch.ops.aten.detach.default else result


@pytest.mark.parametrize("kind", ["wrapper", "fake", "meta"])
def test_a_parameter_without_memory_of_its_own_is_an_error(kind: str) -> None:
    data: Tensor = torch.randn(SHAPE)
    if kind == "wrapper":
        data = Wrapper(data)
    elif kind == "fake":
        data = FakeTensorMode().from_tensor(data)
    else:
        data = data.to("meta")
    params, _ = stepped(count=1)
    param = nn.Parameter(data)
    optimizer = FusedDriftAdamW([("sound", params[0]), ("odd", param)])
    before = params[0].detach().clone()
    param.grad = torch.zeros_like(param) if kind != "wrapper" else Wrapper(torch.zeros(SHAPE))
    with pytest.raises(TypeError, match=r"^parameter odd has no memory of its own"):
        optimizer.step()
    assert torch.equal(params[0], before)


# Gradients


@pytest.mark.parametrize("shape", [(99, 64), (64, 100), (200, 64)])
def test_a_gradient_of_another_shape(shape: tuple[int, ...]) -> None:
    """torch allows this through `.data`."""
    params, optimizer = stepped()
    for p in params:
        p.grad = torch.ones(SHAPE)
    params[2].grad.data = torch.ones(shape)
    raises_and_changes_nothing(params, optimizer, ValueError, r"the gradient of parameter layer2.weight has shape \(")


def test_a_gradient_of_another_dtype() -> None:
    params, optimizer = stepped()
    for p in params:
        p.grad = torch.ones(SHAPE)
    params[2].grad.data = torch.ones(SHAPE, dtype=torch.float64)
    raises_and_changes_nothing(
        params, optimizer, TypeError, r"the gradient of parameter layer2.weight has dtype torch.float64"
    )


# States

CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "smaller": (lambda s: s.update(exp_avg=torch.zeros(8)), "state exp_avg of parameter layer1.weight has shape"),
    "another dtype": (
        lambda s: s.update(exp_avg=s["exp_avg"].to(torch.bfloat16)),
        "parameter layer1.weight are torch.bfloat16 and torch.float32",
    ),
    "float64": (
        lambda s: s.update({key: s[key].double() for key in ("exp_avg", "exp_avg_sq")}),
        "parameter layer1.weight are torch.float64",
    ),
    "gone": (lambda s: s.pop("exp_avg_sq"), "state of parameter layer1.weight lacks exp_avg_sq"),
    "elsewhere": (lambda s: s.update(exp_avg=s["exp_avg"].to("meta")), "exp_avg of parameter layer1.weight is on meta"),
    "smaller by data": (
        lambda s: setattr(s["exp_avg"], "data", torch.zeros(8)),
        "state exp_avg of parameter layer1.weight has shape",
    ),
    "cut in place": (
        lambda s: setattr(s["exp_avg"], "data", s["exp_avg"].data[:50]),
        "state exp_avg of parameter layer1.weight has shape",
    ),
    "another dtype by data": (
        lambda s: setattr(s["exp_avg"], "data", s["exp_avg"].data.to(torch.bfloat16)),
        "parameter layer1.weight are torch.bfloat16 and torch.float32",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_does_not_fit(change: str) -> None:
    params, optimizer = stepped()
    function, words = CHANGES[change]
    function(optimizer.state[params[1]])
    for p in params:
        p.grad = torch.ones(SHAPE)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("what", ["param", "grad", "exp_avg", "exp_avg_sq"])
def test_memory_that_has_been_given_back(what: str) -> None:
    """As when sharding frees parameters, or offloading frees states: the tensor remains, its storage is empty."""
    params, optimizer = stepped()
    for p in params:
        p.grad = torch.ones(SHAPE)
    if what != "grad":  # also of a view into a larger buffer
        target = params[1] if what == "param" else optimizer.state[params[1]][what]
        target.data = torch.cat([torch.zeros(3, 64), target.data])[3:]
    of = {"param": params[1], "grad": params[1].grad, **optimizer.state[params[1]]}
    of[what].untyped_storage().resize_(0)
    name = {"param": "parameter", "grad": "the gradient of parameter"}.get(what, f"the state {what} of parameter")
    with pytest.raises(TypeError, match=rf"^{name} layer1.weight has no memory of its own: .* freed"):
        optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 1.0


def test_a_bias_on_a_gradient_of_another_shape() -> None:
    param = nn.Parameter(torch.zeros(SHAPE))
    bias = GradientBias([("w", param)], {"w": torch.ones(SHAPE)}, prior_scaling="absolute")
    for wrong in (False, True):
        param.grad = torch.ones(SHAPE)
        if wrong:
            param.grad.data = torch.ones(64, 100)
            with pytest.raises(ValueError, match=r"the gradient of parameter w has shape \(64, 100\)"):
                bias.apply_()
        else:
            bias.apply_()
    assert bool((param.grad == 1).all())


def test_a_parameter_that_is_not_contiguous_is_stepped_in_the_backward_pass() -> None:
    ours = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours).to(memory_format=torch.contiguous_format)
    assert not ours.weight.is_contiguous()
    x = torch.randn(2, 4, 5, 5)
    optimizers = [FusedDriftAdamW(m.parameters(), lr=0.1) for m in (ours, theirs)]
    optimizers[0].attach_to_backward()
    for _ in range(3):
        gradient = torch.autograd.grad(theirs(x).square().sum(), list(theirs.parameters()))
        for p, grad in zip(theirs.parameters(), gradient, strict=True):
            p.grad = grad
        optimizers[1].step()
        sum((p * grad).sum() for p, grad in zip(ours.parameters(), gradient, strict=True)).backward()  # type: ignore[union-attr]
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)
    assert ours.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_states_of_which_only_some_were_moved(key: str, which: int, backend: str) -> None:
    """As with offloading down to a budget: the current state is used, wherever it is in its launch."""
    params, optimizer = stepped(backend=backend)
    state = optimizer.state[params[which]]
    state[key].data = torch.full(SHAPE, 3.0)
    junk = torch.full(SHAPE, -1e20)  # takes the memory that has just been freed
    for p in params:
        p.grad = torch.ones(SHAPE)
    optimizer.step()
    beta = {"exp_avg": 0.9, "exp_avg_sq": 0.999}[key]
    torch.testing.assert_close(state[key], torch.full(SHAPE, beta * 3.0 + (1 - beta)))
    assert all(bool(p.isfinite().all()) for p in params)
    assert bool((junk == -1e20).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
def test_a_state_that_was_put_in_by_hand_is_used(strides: str, backend: str) -> None:
    """Like torch.optim.AdamW, whatever its strides."""
    params, optimizer = stepped(backend=backend)
    same = [nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.AdamW(same, lr=0.1)
    for p, q in zip(params, same, strict=True):
        state = {"step": torch.tensor(5.0), "exp_avg": torch.randn(SHAPE), "exp_avg_sq": torch.rand(SHAPE)}
        theirs.state[q] = copy.deepcopy(state)
        if strides == "transposed":
            state |= {key: state[key].t().contiguous().t() for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = state
        p.grad, q.grad = torch.ones(SHAPE), torch.ones(SHAPE)
    optimizer.step()
    theirs.step()
    for p, q in zip(params, same, strict=True):
        torch.testing.assert_close(p, q)
        for key, value in theirs.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value)
