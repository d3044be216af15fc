"""state_dicts: interchangeable with torch.optim.AdamW's, in the state's own dtype, with the right prior."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from drift_kernels import FusedDriftAdamW, PriorMismatchError


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(9, 17), nn.Linear(17, 3)).to(dtype)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    dtype: torch.dtype, state_dtype: torch.dtype, seed: int
) -> None:
    net = model(dtype)
    deltas = {name: torch.randn_like(p) for name, p in net.named_parameters()}

    def optimizer(of: nn.Module) -> FusedDriftAdamW:
        return FusedDriftAdamW(of.named_parameters(), lr=1e-2, prior=deltas, max_grad_norm=1.0, state_dtype=state_dtype)

    first = optimizer(net)
    train(net, first, 3, seed)
    resumed = copy.deepcopy(net)
    second = optimizer(resumed)
    second.load_state_dict(through_a_file(first.state_dict()))
    for state in second.state.values():
        assert {key: value.dtype for key, value in state.items()} == {
            "step": torch.float32, "exp_avg": state_dtype, "exp_avg_sq": state_dtype,
        }  # fmt: skip
    train(net, first, 3, seed + 1)
    train(resumed, second, 3, seed + 1)
    assert_equal(net, resumed)


def test_loading_shares_no_memory_with_what_was_loaded(seed: int) -> None:
    net = model()
    first = FusedDriftAdamW(net.parameters())
    train(net, first, 2, seed)
    second = FusedDriftAdamW(copy.deepcopy(net).parameters())
    second.load_state_dict(first.state_dict())
    train(net, first, 2, seed)
    assert {float(state["step"]) for state in second.state.values()} == {2.0}


def test_there_and_back_with_torch_adamw(seed: int) -> None:
    net = model()
    theirs_net = copy.deepcopy(net)
    ours, theirs = FusedDriftAdamW(net.parameters(), lr=1e-2), torch.optim.AdamW(theirs_net.parameters(), lr=1e-2)
    for round_ in range(3):
        train(net, ours, 2, seed + round_)
        train(theirs_net, theirs, 2, seed + round_)
        of_ours, of_theirs = through_a_file(ours.state_dict()), through_a_file(theirs.state_dict())
        ours.load_state_dict(of_theirs)
        theirs.load_state_dict(of_ours)
    for p, q in zip(net.parameters(), theirs_net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_what_torch_does_not_save_is_kept(seed: int) -> None:
    net = model()
    theirs = torch.optim.AdamW(copy.deepcopy(net).parameters(), lr=7e-3)
    ours = FusedDriftAdamW(net.named_parameters(), prior={"0.weight": torch.ones(17, 9)}, alpha=0.25)
    ours.param_groups[0]["prior_scaling"] = "gradnorm"
    ours.load_state_dict(theirs.state_dict())
    group = ours.param_groups[0]
    assert (group["lr"], group["alpha"], group["prior_scaling"]) == (7e-3, 0.25, "gradnorm")
    train(net, ours, 1, seed)


def test_a_state_of_another_prior_does_not_load(seed: int) -> None:
    net = model()

    def optimizer(prior: dict[str, torch.Tensor] | None) -> FusedDriftAdamW:
        return FusedDriftAdamW(net.named_parameters(), prior=prior)

    first = optimizer({"0.weight": torch.ones(17, 9)})
    train(net, first, 1, seed)
    saved = through_a_file(first.state_dict())
    optimizer({"0.weight": torch.ones(17, 9)}).load_state_dict(saved)
    for other in (optimizer({"0.weight": torch.full((17, 9), 2.0)}), optimizer(None)):
        with pytest.raises(PriorMismatchError, match=r"saved with the prior"):
            other.load_state_dict(saved)
        assert not other.state


def test_a_state_belongs_to_the_prior_that_it_went_on_under(seed: int) -> None:
    net = model()
    first = FusedDriftAdamW(net.named_parameters())
    train(net, first, 1, seed)
    second = FusedDriftAdamW(net.named_parameters(), prior={"0.weight": torch.ones(17, 9)})
    second.load_state_dict(through_a_file(first.state_dict()))
    with pytest.raises(PriorMismatchError, match=r"saved with the prior .*, but this optimizer has none"):
        first.load_state_dict(through_a_file(second.state_dict()))


@pytest.mark.parametrize(
    ("lrs", "largest", "only_asks"),
    [
        ((0.0, 0.0), 0.0, True),
        ((torch.tensor(0.0), 0.0), 0.0, True),
        ((0.0, 1e-3), 0.0, False),
        ((0.0, 0.0), 1e-9, False),
    ],
)
def test_a_first_step_only_asks_for_states_at_lr_zero_on_gradients_of_zeros(
    lrs: tuple[Any, Any], largest: float, only_asks: bool
) -> None:
    """As torch.distributed.checkpoint takes one: the prior leaves no trace. A warm-up begins at lr 0 too, on gradients.
    Once there are states, such a step counts."""
    net = model()
    deltas = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    named = list(net.named_parameters())
    groups = [{"params": named[:2], "lr": lrs[0]}, {"params": named[2:], "lr": lrs[1]}]
    ours = FusedDriftAdamW(groups, prior=deltas, prior_scaling="absolute")
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net[1].bias.grad[2] = largest
    ours.step()
    assert {float(ours.state[p]["step"]) for p in net.parameters()} == {0.0 if only_asks else 1.0}
    assert all(bool(ours.state[p]["exp_avg"].any()) != only_asks for p in net.parameters())
    ours.step()
    assert {float(ours.state[p]["step"]) for p in net.parameters()} == {1.0 if only_asks else 2.0}
    assert all(ours.state[p]["exp_avg"].all() for p in net.parameters())


def test_a_damaged_or_foreign_state_dict_changes_nothing(seed: int) -> None:
    net = model()
    ours = FusedDriftAdamW(net.parameters())
    train(net, ours, 1, seed)
    good = copy.deepcopy(ours.state_dict())

    def bad(change: Any) -> dict[str, Any]:
        changed = copy.deepcopy(good)
        change(changed)
        return changed

    cases = {
        "shape": bad(lambda sd: sd["state"][1].update(exp_avg=torch.zeros(5))),
        "lacks exp_avg_sq": bad(lambda sd: sd["state"][0].pop("exp_avg_sq")),
        "amsgrad": bad(lambda sd: sd["param_groups"][0].update(amsgrad=True)),
        "groups of sizes": bad(lambda sd: sd["param_groups"][0]["params"].pop()),
        "groups of sizes ": bad(lambda sd: sd["param_groups"].append(sd["param_groups"][0])),
    }
    for words, state_dict in cases.items():
        with pytest.raises(ValueError, match=words.strip()):
            ours.load_state_dict(state_dict)
        for i, p in enumerate(net.parameters()):
            for key, value in good["state"][i].items():
                assert torch.equal(ours.state[p][key], value)


def test_hooks_of_the_user_are_heard() -> None:
    net = model(torch.bfloat16)
    ours = FusedDriftAdamW(net.parameters())
    train(net, ours, 1, 0)
    saved = copy.deepcopy(ours.state_dict())

    def double(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        states = {i: {**s, "exp_avg": s["exp_avg"] * 2} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": states}

    ours.register_load_state_dict_pre_hook(double)
    ours.load_state_dict(saved)
    for i, p in enumerate(net.parameters()):
        assert torch.equal(ours.state[p]["exp_avg"], saved["state"][i]["exp_avg"] * 2)


def test_masters_begin_at_the_parameters_if_none_were_saved_and_are_dropped_if_none_are_kept(seed: int) -> None:
    net = model(torch.bfloat16)
    plain = FusedDriftAdamW(net.parameters(), lr=1e-2)
    train(net, plain, 2, seed)
    masters = FusedDriftAdamW(net.parameters(), lr=1e-2, master_weights=True)
    masters.load_state_dict(through_a_file(plain.state_dict()))
    for p in net.parameters():
        assert torch.equal(masters.master_weight(p), p.detach().float())
        assert torch.equal(masters.state[p]["exp_avg"], plain.state[p]["exp_avg"])
    train(net, masters, 2, seed)
    assert any(bool((masters.master_weight(p) != p.detach().float()).any()) for p in net.parameters())
    plain.load_state_dict(through_a_file(masters.state_dict()))
    for p in net.parameters():
        assert plain.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(masters.state[p]["exp_avg"], plain.state[p]["exp_avg"])
