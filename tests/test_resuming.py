"""What a saved state means to whoever loads it: codes are not taken for moments, states reach the parameter of their
name, and what a user keeps beside them stays."""

from __future__ import annotations

import copy
import io
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from drift_kernels import FusedDriftAdamW

BF16 = torch.bfloat16
SHAPES = {"a.weight": (33, 128), "a.bias": (33,), "b.weight": (5, 7), "b.bias": (5,)}
Params = dict[str, nn.Parameter]


def make(dtype: torch.dtype = torch.float32) -> Params:
    return {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}


def copies(params: Params) -> Params:
    return {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}


def steps(count: int, *runs: tuple[Params, torch.optim.Optimizer]) -> None:
    """On the same gradients."""
    for _ in range(count):
        grads = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        for params, optimizer in runs:
            for name, param in params.items():
                param.grad = grads[name].to(param.dtype)
            optimizer.step()


def groups_of(params: Params, *groups: str, **options: Any) -> list[dict[str, Any]]:
    """Param groups by the names in them."""
    return [{"params": [(name, params[name]) for name in names.split()], **options} for names in groups]


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(state: dict[str, Any], other: dict[str, Any]) -> None:
    assert state.keys() == other.keys()
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])) for key, value in state.items())


# Codes


def test_torch_does_not_take_codes_for_moments() -> None:
    params = make()
    ours = FusedDriftAdamW(params.items(), state_dtype="int8")
    steps(2, (params, ours))
    theirs = torch.optim.AdamW(params.items())
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        theirs.step()
    theirs.load_state_dict(ours.state_dict(dtype=torch.float32))
    theirs.step()


def test_codes_under_the_keys_of_moments_are_still_codes() -> None:
    """As they were saved once: into codes bit for bit, and into float32 as the values that they stand for."""
    params = make()
    first = FusedDriftAdamW(params.items(), state_dtype="int8")
    steps(2, (params, first))
    old = through_a_file(first.state_dict())
    for state in old["state"].values():
        for key in [key for key in state if key.endswith("_codes")]:
            state[key.removesuffix("_codes")] = state.pop(key)
    assert old["state"][0]["exp_avg"].dtype == torch.int8
    coded, wide = FusedDriftAdamW(params.items(), state_dtype="int8"), FusedDriftAdamW(params.items())
    coded.load_state_dict(old)
    wide.load_state_dict(old)
    for i, param in enumerate(params.values()):
        assert_same_state(coded.state[param], first.state[param])
        assert_same_state(wide.state[param], first.state_dict(dtype=torch.float32)["state"][i])


class Pair(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(128, 33, dtype=dtype), nn.Linear(7, 5, dtype=dtype)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("saved_as", "loaded_as"), [("int8", "float32"), ("float32", "int8")])
def test_a_checkpoint_of_codes_is_none_of_moments(saved_as: str, loaded_as: str, flat: bool, tmp_path: Path) -> None:
    """torch.distributed.checkpoint casts to what it finds; it must not find what is something else."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = Pair(), Pair()
    first = FusedDriftAdamW(model.named_parameters(), state_dtype=saved_as)
    steps(2, (dict(model.named_parameters()), first))
    dcp.save({"o": get_state_dict(model, first, options=options)[1]}, checkpoint_id=tmp_path, no_dist=True)
    second = FusedDriftAdamW(other.named_parameters(), state_dtype=loaded_as)
    state = {"o": get_state_dict(other, second, options=options)[1]}
    with pytest.raises(
        CheckpointException, match=r"Missing key in checkpoint state_dict: o\.state\.a\.weight\.exp_avg"
    ):
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)


# Names

ORDERS = [
    ("a.weight a.bias b.weight b.bias",),
    ("b.bias a.bias b.weight a.weight",),
    ("a.weight b.weight", "a.bias b.bias"),
    ("b.bias a.bias", "b.weight a.weight"),
]


@pytest.mark.parametrize(("saved_in", "loaded_in"), list(itertools.permutations(ORDERS, 2)))
def test_a_state_reaches_the_parameter_of_its_name(saved_in: tuple[str, ...], loaded_in: tuple[str, ...]) -> None:
    """And the run goes on bit for bit, in whatever order and groups they are."""
    params = make()
    first = FusedDriftAdamW(groups_of(params, *saved_in), lr=1e-2, state_dtype="int8")
    steps(2, (params, first))
    resumed = copies(params)
    second = FusedDriftAdamW(groups_of(resumed, *loaded_in), lr=1e-2, state_dtype="int8")
    second.load_state_dict(through_a_file(first.state_dict()))
    assert [" ".join(group["param_names"]) for group in second.param_groups] == list(loaded_in)
    for name, param in params.items():
        assert_same_state(second.state[resumed[name]], first.state[param])
    steps(2, (params, first), (resumed, second))
    assert all(torch.equal(param, resumed[name]) for name, param in params.items())


def test_hyperparameters_go_with_a_group_of_the_same_parameters(caplog: pytest.LogCaptureFixture) -> None:
    params = make()
    saved_groups = groups_of(params, "a.weight b.weight", "a.bias b.bias")
    saved_groups[0] |= {"lr": 0.5, "betas": (0.8, 0.9), "mine": "kept"}
    saved_groups[1] |= {"lr": 0.25}
    first = FusedDriftAdamW(saved_groups, seed=5)
    steps(1, (params, first))
    second = FusedDriftAdamW(groups_of(params, "b.bias a.bias", "b.weight a.weight"), lr=0.1, seed=6)
    second.load_state_dict(first.state_dict())
    assert [group["lr"] for group in second.param_groups] == [0.25, 0.5]
    assert [group["seed"] for group in second.param_groups] == [5, 5]
    assert (second.param_groups[1]["betas"], second.param_groups[1]["mine"]) == ((0.8, 0.9), "kept")
    assert not caplog.records
    third = FusedDriftAdamW(groups_of(params, "b.bias", "a.bias a.weight", "b.weight"), lr=0.1, seed=6)
    with caplog.at_level(logging.WARNING, "drift_kernels"):
        third.load_state_dict(first.state_dict())
    assert [group["lr"] for group in third.param_groups] == [0.1] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "param groups 0, 1, 2 keep their current hyperparameters, because the state_dict groups their parameters "
        "differently; states are loaded by name"
    ]


@pytest.mark.parametrize("wrapped", ["saved", "loaded"])
def test_names_of_wrappers_do_not_matter(wrapped: str) -> None:
    params = make()
    under = {f"module.{name.replace('.', '._orig_mod.')}": param for name, param in reversed(params.items())}
    saved, loaded = (under, params) if wrapped == "saved" else (params, under)
    first, second = FusedDriftAdamW(saved.items()), FusedDriftAdamW(loaded.items())
    steps(1, (params, first))
    second.load_state_dict(first.state_dict())
    for param in params.values():
        assert_same_state(second.state[param], first.state[param])


def test_models_that_share_names_keep_their_order() -> None:
    one, two = make(), make()
    named = [*one.items(), *two.items()]
    first, second = FusedDriftAdamW(named), FusedDriftAdamW([*reversed(one.items()), *two.items()])
    steps(1, (one, first))
    steps(1, (two, first))
    second.load_state_dict(first.state_dict())
    for param in (*one.values(), *two.values()):
        assert_same_state(second.state[param], first.state[param])


def test_other_names_are_an_error_and_change_nothing() -> None:
    params = make()
    first = FusedDriftAdamW(params.items(), lr=0.5)
    steps(1, (params, first))
    others = {f"other.{name}": param for name, param in params.items()}
    second = FusedDriftAdamW([*others.items(), ("a.bias", nn.Parameter(torch.zeros(33)))], lr=0.1)
    words = (
        r"are not those of this optimizer: unexpected 3 \(a\.weight, b\.weight, b\.bias\), missing 4 "
        r"\(other\.a\.weight, other\.a\.bias, other\.b\.weight, \.\.\.\); to load it by position, remove 'param_names'"
    )
    with pytest.raises(ValueError, match=words):
        second.load_state_dict(first.state_dict())
    assert not second.state
    assert second.param_groups[0]["lr"] == 0.1
    third = FusedDriftAdamW(others.items())
    saved = first.state_dict()
    del saved["param_groups"][0]["param_names"]
    third.load_state_dict(saved)
    assert_same_state(third.state[others["other.a.bias"]], first.state[params["a.bias"]])
    assert third.param_groups[0]["param_names"] == list(others)


@pytest.mark.parametrize("named", ["saved", "loaded", "neither", "too few"])
def test_without_names_on_one_side_it_goes_by_position(named: str) -> None:
    params = make()
    first = FusedDriftAdamW(params.items() if named in ("saved", "too few") else params.values())
    steps(1, (params, first))
    saved = first.state_dict()
    if named == "too few":
        saved["param_groups"][0]["param_names"].pop()
    swapped = [(name, params[name]) for name in ("a.weight", "b.bias", "b.weight", "a.bias")]
    second = FusedDriftAdamW([("a.weight", params["a.weight"]), *swapped[1:]] if named != "saved" else params.values())
    if named in ("loaded", "neither", "too few"):
        with pytest.raises(ValueError, match=r"exp_avg of parameter b\.bias has shape"):
            second.load_state_dict(saved)
    else:
        second.load_state_dict(saved)
        assert second.param_groups[0]["param_names"] == list(params), "as torch has it"


def test_a_hook_of_the_user_may_rename() -> None:
    """torch's own way: it is heard before anything is compared."""
    params = make()
    first = FusedDriftAdamW([(f"old.{name}", param) for name, param in params.items()])
    steps(1, (params, first))

    def rename(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = copy.deepcopy(state_dict)
        for group in state_dict["param_groups"]:
            group["param_names"] = [name.removeprefix("old.") for name in group["param_names"]]
        return state_dict

    second = FusedDriftAdamW(reversed(params.items()))
    second.register_load_state_dict_pre_hook(rename)
    second.load_state_dict(first.state_dict())
    for param in params.values():
        assert_same_state(second.state[param], first.state[param])


@pytest.mark.parametrize("flat", [False, True])
def test_a_checkpoint_reaches_the_parameters_of_its_names_too(flat: bool, tmp_path: Path) -> None:
    """torch.distributed.checkpoint puts states in the order of the optimizer, and leaves names in that of the file."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, other = Pair(), Pair()
    first = FusedDriftAdamW(model.named_parameters())
    params = dict(model.named_parameters())
    steps(2, (params, first))
    dcp.save({"o": get_state_dict(model, first, options=options)[1]}, checkpoint_id=tmp_path, no_dist=True)
    others = dict(other.named_parameters())
    second = FusedDriftAdamW(reversed(others.items()))
    model_state, optimizer_state = get_state_dict(other, second, options=options)
    state = {"o": optimizer_state}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, second, model_state_dict=model_state, optim_state_dict=state["o"], options=options)
    assert second.param_groups[0]["param_names"] == list(reversed(others))
    for name, param in params.items():
        assert_same_state(second.state[others[name]], first.state[param])


# What users keep


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, FusedDriftAdamW])
def test_what_a_user_keeps_in_a_state_survives(optimizer_class: type[torch.optim.Optimizer]) -> None:
    params = make(BF16)
    first, second = optimizer_class(params.items()), optimizer_class(params.items())
    steps(1, (params, first))
    kept: dict[str, Any] = {"ema": torch.ones(33), "count": 3, "more": {"x": torch.arange(4)}, "pair": [1, 2]}
    first.state[params["a.bias"]].update(kept)
    second.load_state_dict(through_a_file(first.state_dict()))
    found = second.state[params["a.bias"]]
    assert found.keys() == first.state[params["a.bias"]].keys()
    assert (found["count"], found["pair"]) == (3, [1, 2])
    assert (found["ema"].dtype, found["ema"].tolist()) == (BF16, [1.0] * 33)
    assert torch.equal(found["more"]["x"], torch.arange(4))


def test_a_parameter_without_our_states_keeps_a_users_and_gets_ours_when_it_steps() -> None:
    params = make()
    first = FusedDriftAdamW(params.items())
    ema = torch.full((33,), 2.0)
    first.state[params["a.bias"]]["ema"] = ema
    second = FusedDriftAdamW(params.items())
    second.load_state_dict(first.state_dict())
    assert list(second.state[params["a.bias"]]) == ["ema"]
    plain = copies(params)
    steps(2, (params, second), (plain, FusedDriftAdamW(plain.items())))
    assert all(torch.equal(param, plain[name]) for name, param in params.items())
    found: dict[str, Tensor] = second.state[params["a.bias"]]
    assert set(found) == {"ema", "step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(found["ema"], ema)


def test_the_state_of_another_kind_of_optimizer_is_an_error() -> None:
    params = make()
    for theirs in (torch.optim.SGD(params.values(), lr=0.1, momentum=0.9), torch.optim.Adagrad(params.values())):
        steps(1, (params, theirs))
        with pytest.raises(ValueError, match="not a state of AdamW"):
            FusedDriftAdamW(params.values()).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"param_residual": torch.zeros(33, 128)}, "param_residual of parameter a.weight has dtype torch.float32"),
        ({"param_residual": torch.zeros(7, dtype=torch.int16)}, "param_residual .* has shape"),
        ({"exp_avg_scale": None}, "has codes without exp_avg_scale"),
        ({"exp_avg_sq_scale": torch.zeros(3)}, "exp_avg_sq_scale .* has shape"),
        ({"exp_avg_codes": torch.zeros(33, 128)}, r"exp_avg_codes .* has dtype torch.float32, expected torch\.int8"),
        ({"exp_avg_codes": None}, "lacks exp_avg"),
        (
            {"exp_avg_codes": None, "exp_avg": torch.zeros(33, 128, dtype=torch.int32)},
            "exp_avg .* has dtype torch.int32, expected a floating-point dtype",
        ),
        ({"exp_avg_codes": 3.0}, "has float for exp_avg_codes"),
    ],
)
def test_a_damaged_state_changes_nothing(change: dict[str, Tensor | None], words: str) -> None:
    params = make(BF16)
    optimizer = FusedDriftAdamW(params.items(), state_dtype="int8", master_weights=True)
    steps(1, (params, optimizer))
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    for key, value in change.items():
        if value is None:
            del saved["state"][0][key]
        else:
            saved["state"][0][key] = value
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[index][key]) for key, value in state.items())
