"""What the engine keeps from step to step, and what it does not: parameters, states and gradients belong to others."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from biasing import DEVICE, make_deltas, make_params, random_grads, watched_loads
from torch import Tensor, nn

from drift_kernels import FusedDriftAdamW, GradientBias, Prior, attach_prior, bias_gradients_
from drift_kernels.engine.seen import Seen

Params = dict[str, nn.Parameter]

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"state_dtype": torch.int8},
    "masters": {"master_weights": True, "state_dtype": torch.bfloat16, "rounding": "stochastic"},
    "on the device": {"capturable": True},
}


def pair(**options: Any) -> tuple[Params, FusedDriftAdamW]:
    """Parameters and their optimizer, after two steps."""
    dtype = torch.bfloat16 if "master_weights" in options else torch.float32
    params = {f"layers.{i}.weight": nn.Parameter(torch.randn(64 + i, 128, device=DEVICE).to(dtype)) for i in range(3)}
    deltas = {name: torch.randn_like(p) for name, p in params.items()}
    optimizer = FusedDriftAdamW(params.items(), lr=1e-2, prior=deltas, prior_scaling="absolute", seed=3, **options)
    for step in range(2):
        take(params, optimizer, step)
    return params, optimizer


def take(params: Params, optimizer: FusedDriftAdamW, step: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(step)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator, device=DEVICE).to(p.dtype)
    optimizer.step()
    optimizer.zero_grad()


def replace_states(optimizer: FusedDriftAdamW, params: Params) -> None:
    for state in optimizer.state.values():
        for key in state:
            state[key] = state[key].clone()


def clear_states(optimizer: FusedDriftAdamW, params: Params) -> None:
    optimizer.state.clear()


def remove_the_last(optimizer: FusedDriftAdamW, params: Params) -> None:
    group, param = optimizer.param_groups[0], params.popitem()[1]
    group["params"].pop()
    group["param_names"].pop()
    del optimizer.state[param]


def watched(optimizer: FusedDriftAdamW, params: Params) -> list[weakref.ref[Tensor]]:
    """The last parameter and its states, but the step, which is a view."""
    param = list(params.values())[-1]
    return [weakref.ref(t) for t in (param, *optimizer.state[param].values())]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("change", [replace_states, clear_states, remove_the_last])
def test_states_and_parameters_are_freed_when_their_owner_lets_go(
    change: Callable[[FusedDriftAdamW, Params], None], options: dict[str, Any]
) -> None:
    """At once, without a step and without a collection of cycles, as `torch.optim.AdamW` frees them."""
    params, optimizer = pair(**options)
    param, *states = watched(optimizer, params)
    gc.disable()
    try:
        change(optimizer, params)
        assert [ref() for ref in states] == [None] * len(states)
        if change is remove_the_last:
            assert param() is None
    finally:
        gc.enable()
    take(params, optimizer, 2)


@pytest.mark.parametrize("kept", [True, False], ids=["the old are kept", "the old are freed"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_replaced_states_are_those_that_a_step_uses(options: dict[str, Any], kept: bool) -> None:
    """Bit for bit, whether or not others lie where the old ones were."""
    params, optimizer = pair(**options)
    same, untouched = copy.deepcopy((params, optimizer))
    old = [value for state in optimizer.state.values() for value in state.values()]
    replace_states(optimizer, params)
    poison = []
    if not kept:
        shapes = [(t.shape, t.dtype) for t in old]
        old.clear()
        poison = [torch.full(shape, 77, dtype=dtype, device=DEVICE) for shape, dtype in shapes]
    for step in (2, 3):
        take(params, optimizer, step)
        take(same, untouched, step)
    for p, q in zip(params.values(), same.values(), strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, untouched.state[q][key]), key
    assert all(bool((t == 77).all()) for t in poison)


def test_one_replaced_step_count_is_the_one_that_counts() -> None:
    params, optimizer = pair()
    param = params["layers.1.weight"]
    before = optimizer.state[param]["step"]
    optimizer.state[param]["step"] = torch.tensor(10.0)
    take(params, optimizer, 2)
    assert float(optimizer.state[param]["step"]) == 11.0
    assert float(before) == 2.0
    assert float(optimizer.state[params["layers.0.weight"]]["step"]) == 3.0


def test_a_parameter_in_the_place_of_another_begins_anew() -> None:
    """Though it has its memory, and the other still lives."""
    params, optimizer = pair()
    old = params["layers.1.weight"]
    new = params["layers.1.weight"] = nn.Parameter(old.data)
    optimizer.param_groups[0]["params"][1] = new
    take(params, optimizer, 2)
    assert float(optimizer.state[new]["step"]) == 1.0
    assert float(optimizer.state[old]["step"]) == 2.0


def test_a_module_may_swap_its_parameters() -> None:
    """As `torch.__future__.set_swap_module_params_on_conversion` has it."""
    param, other = nn.Parameter(torch.ones(100)), nn.Parameter(torch.full((100,), 2.0))
    optimizer = FusedDriftAdamW([param], lr=0.0, weight_decay=0.0)
    take({"": param}, optimizer, 0)
    take({"": param}, optimizer, 1)
    torch.utils.swap_tensors(param, other)
    take({"": param}, optimizer, 2)
    assert float(optimizer.state[param]["step"]) == 3.0
    assert bool((param == 2).all())


def test_a_memory_report_outlives_the_states() -> None:
    params, optimizer = pair(state_dtype="int8")
    before = optimizer.memory_report()
    replace_states(optimizer, params)
    assert optimizer.memory_report() == before
    assert before["states"] == 2.0


@pytest.mark.parametrize("with_gradients", [True, False])
def test_an_attached_optimizer_lets_go_of_replaced_states(with_gradients: bool) -> None:
    params, optimizer = pair()
    handle = optimizer.attach_to_backward()

    def backward() -> None:
        sum((p * 0.5).square().sum() for p in params.values()).backward()  # type: ignore[union-attr]

    if with_gradients:
        backward()
    refs = watched(optimizer, params)[1:]
    replace_states(optimizer, params)
    assert [ref() for ref in refs] == [None] * len(refs)
    backward()
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0 + with_gradients}
    handle.remove()
    take(params, optimizer, 5)


# Biases


def test_a_parameter_that_grows_is_bound_anew() -> None:
    """As by a bias that is made for what it is now: zero for the new rows, scaled to the norm that it has now."""
    delta = torch.randn(20, 7, device=DEVICE)
    param = nn.Parameter(torch.randn(20, 7, device=DEVICE))
    options: dict[str, Any] = {"prior_scaling": "absolute", "normalize_to_param": True}
    bias = GradientBias([("embed_tokens.weight", param)], {"embed_tokens.weight": delta}, **options)
    for rows in (20, 23):
        param.grad = None
        param.data = torch.randn(rows, 7, device=DEVICE) * rows
        grad = torch.randn_like(param)
        expected = nn.Parameter(param.detach().clone())
        expected.grad, param.grad = grad.clone(), grad.clone()
        GradientBias([("embed_tokens.weight", expected)], {"embed_tokens.weight": delta}, **options).apply_()
        bias.apply_()
        assert torch.equal(param.grad, expected.grad)
        assert torch.equal(param.grad[20:], grad[20:])


def test_a_used_bias_keeps_no_gradient_alive_and_bias_gradients_no_parameter() -> None:
    params, prior = make_params(), Prior.from_mapping(make_deltas())
    random_grads(params)
    grads = [weakref.ref(p.grad) for p in params.values() if p.grad is not None]
    before = set(vars(prior))
    bias_gradients_(params.items(), prior)
    assert set(vars(prior)) == before, "nothing is kept on the prior"
    GradientBias(params.items(), prior).apply_()
    refs = [weakref.ref(p) for p in params.values()]
    for p in params.values():
        p.grad = None
    gc.collect()
    assert [ref() for ref in grads] == [None] * len(grads)
    del p
    params.clear()
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


def test_bias_gradients_lets_go_of_a_prior_and_of_its_deltas() -> None:
    params = make_params()
    deltas = make_deltas()
    refs = [weakref.ref(delta) for delta in deltas.values()]
    prior = Prior.from_mapping(deltas)
    random_grads(params)
    bias_gradients_(params.items(), prior)
    gone = weakref.ref(prior)
    del prior
    deltas.clear()
    gc.collect()
    assert gone() is None
    assert [ref() for ref in refs] == [None] * len(refs)


def test_two_priors_on_one_model_are_both_kept_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is loaded once, however often they take turns."""
    params, priors = make_params(), [Prior.from_mapping(make_deltas()) for _ in range(2)]
    loaded = watched_loads(monkeypatch)
    for _ in range(3):
        for prior in priors:
            random_grads(params)
            bias_gradients_(params.items(), prior)
    assert [len(loaded[prior]) for prior in priors] == [len(prior) for prior in priors]


def test_removed_hooks_let_go_of_the_deltas() -> None:
    params, deltas = make_params(), make_deltas()
    refs = [weakref.ref(delta) for delta in deltas.values()]
    model = nn.ParameterDict({name.replace(".", "_"): p for name, p in params.items()})
    handle = attach_prior(model, {name.replace(".", "_"): delta for name, delta in deltas.items()})
    sum(p.square().sum() for p in params.values()).backward()  # type: ignore[union-attr]
    handle.remove()
    del handle
    deltas.clear()
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


# What was seen


def test_an_id_that_another_tensor_has_taken_is_not_the_tensor() -> None:
    for _ in range(1000):
        tensor = torch.zeros(1)
        seen, taken = Seen([tensor]), id(tensor)
        assert seen.are([tensor])
        del tensor
        another = torch.zeros(1)
        if id(another) == taken:
            assert not seen.are([another])
            return
    pytest.fail("no id was taken again in 1000 tries")
