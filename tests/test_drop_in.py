"""What torch.optim.AdamW takes, this takes: keywords, and numbers of other packages. Names and types of arguments."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from drift_kernels import FusedDriftAdamW, GradientBias, Prior, attach_prior, bias_gradients_
from drift_kernels.kernels import backends, scalings
from drift_kernels.prior.strengths import AlphaLike
from drift_kernels.state import precision

BOTH = [torch.optim.AdamW, FusedDriftAdamW]
Optimizers = type[torch.optim.Optimizer]


class Config(Sequence[float]):
    """As OmegaConf's ListConfig: a sequence that is neither a tuple nor a list."""

    def __init__(self, *values: float) -> None:
        self._values = values

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __repr__(self) -> str:
        return f"Config{self._values}"

    def __len__(self) -> int:
        return len(self._values)


def trained(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Tensor:
    torch.manual_seed(3)
    param = nn.Parameter(torch.randn(7, 5))
    one = optimizer([param], **options)
    for _ in range(3):
        param.grad = torch.randn(7, 5)
        one.step()
    return param.detach()


# Keywords


def test_every_keyword_of_torch_is_taken_with_its_default() -> None:
    theirs, ours = (inspect.signature(optimizer).parameters for optimizer in BOTH)
    assert [name for name in theirs if name not in ours] == []
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name
    params = [nn.Parameter(torch.zeros(2))]
    keys = torch.optim.AdamW(params).param_groups[0].keys() - {"decoupled_weight_decay"}  # which torch sets by itself
    assert keys <= FusedDriftAdamW(params).param_groups[0].keys()


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}, {"amsgrad": False}], ids=str
)
def test_keywords_that_choose_an_implementation_change_nothing(options: dict[str, Any]) -> None:
    assert torch.equal(trained(FusedDriftAdamW, **options), trained(FusedDriftAdamW))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"amsgrad": True}, "amsgrad must be False, got True .group 0"),
        ({"differentiable": True}, "differentiable must be False, got True .group 0"),
    ],
)
def test_what_is_lacking_is_an_error(options: dict[str, Any], words: str) -> None:
    param = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=words):
        FusedDriftAdamW([param], **options)
    with pytest.raises(ValueError, match=words):
        FusedDriftAdamW([{"params": [param], **options}])


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {}], ids=str)
def test_keywords_go_both_ways_in_state_dicts(options: dict[str, Any]) -> None:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    theirs, ours, again = (optimizer([param], **options) for optimizer in (*BOTH, torch.optim.AdamW))
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    again.load_state_dict(ours.state_dict())
    again.step()
    assert {key: again.param_groups[0][key] for key in theirs.param_groups[0]} == theirs.param_groups[0]
    assert float(again.state[param]["step"]) == 3.0


# Numbers


@pytest.mark.parametrize(
    "options",
    [
        {"lr": np.float32(2**-7)},
        {"lr": np.float64(2**-7)},
        {"lr": np.array(2**-7)},
        {"lr": Fraction(1, 128)},
        {"lr": torch.tensor(2**-7)},
        {"lr": torch.tensor([2**-7], dtype=torch.float64)},
        {"lr": 2**-7, "betas": Config(0.9, 0.999)},
        {"lr": 2**-7, "betas": [np.float64(0.9), torch.tensor(0.999, dtype=torch.float64)]},
        {"lr": 2**-7, "weight_decay": np.float64(1e-2), "eps": np.float64(1e-8)},
        {"lr": 2**-7, "alpha": np.int64(1), "max_grad_norm": np.float32(np.inf), "seed": np.int64(0)},
    ],
    ids=str,
)
def test_numbers_of_any_package(options: dict[str, Any]) -> None:
    """The bits of Python's numbers."""
    clips = {"max_grad_norm": float("inf")} if "max_grad_norm" in options else {}
    assert torch.equal(trained(FusedDriftAdamW, **options), trained(FusedDriftAdamW, lr=2**-7, **clips))


@pytest.mark.parametrize("one", [1, np.int64(1), np.uint8(1), torch.tensor(1), torch.tensor([1], dtype=torch.int32)])
def test_integers(one: Any) -> None:
    assert torch.equal(trained(FusedDriftAdamW, lr=one), trained(FusedDriftAdamW, lr=1.0))
    assert torch.equal(
        trained(FusedDriftAdamW, lr=torch.tensor(1), capturable=True), trained(FusedDriftAdamW, lr=1.0, capturable=True)
    )


def test_a_seed_of_few_bits_is_a_seed() -> None:
    def run(seed: Any) -> Tensor:
        torch.manual_seed(1)
        params = [nn.Parameter(torch.randn(99).bfloat16()) for _ in range(2)]
        optimizer = FusedDriftAdamW(params, rounding="stochastic", seed=seed)
        for param in params:
            param.grad = torch.randn(99).bfloat16()
        optimizer.step()
        return torch.cat([param.detach() for param in params])

    assert torch.equal(run(np.uint8(7)), run(7))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": True}, TypeError, "lr must be a number, got lr=True of type bool"),
        ({"lr": np.bool_(True)}, TypeError, "lr must be a number, got .* of type bool"),
        ({"lr": torch.tensor(True)}, TypeError, "lr must be a number, got .* of type Tensor"),
        ({"lr": torch.ones(2)}, TypeError, "lr must be a number, got .* of type Tensor"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number, got lr='1e-3' of type str"),
        ({"lr": torch.tensor(1j)}, TypeError, "lr must be a number"),
        ({"lr": np.float32(np.nan)}, ValueError, "lr must be finite, got lr=nan"),
        ({"betas": "ab"}, TypeError, "betas must be a sequence of two numbers, got betas='ab' of type str"),
        ({"betas": Config(0.9)}, TypeError, "betas must be a sequence of two numbers, got .* of type Config"),
        ({"betas": (0.9, "0.99")}, TypeError, r"betas\[1\] must be a number, got betas\[1\]='0.99' of type str"),
        ({"betas": (False, 0.9)}, TypeError, r"betas\[0\] must be a number, got betas\[0\]=False of type bool"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number or None, got '1' of type str"),
        ({"max_grad_norm": True}, TypeError, "max_grad_norm must be a number or None, got True of type bool"),
        ({"seed": True}, TypeError, "seed must be an integer, got seed=True of type bool"),
        ({"seed": np.float32(1)}, TypeError, "seed must be an integer, got .* of type float32"),
    ],
)
def test_what_is_no_number_is_shown(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FusedDriftAdamW([nn.Parameter(torch.zeros(2))], **options)


def test_a_norm_set_between_steps_is_checked() -> None:
    optimizer = FusedDriftAdamW([nn.Parameter(torch.zeros(2))], max_grad_norm=1.0)
    with pytest.raises(TypeError, match="max_grad_norm must be a number or None"):
        optimizer.max_grad_norm = "much"  # type: ignore[assignment]
    assert optimizer.max_grad_norm == 1.0


# Names and types of arguments


def biases() -> Iterator[tuple[str, Callable[..., Any]]]:
    deltas = {"weight": torch.ones(2, 3)}

    def model() -> nn.Module:
        module = nn.Linear(3, 2)
        module.weight.grad = torch.ones(2, 3)
        return module

    yield "GradientBias", lambda **options: GradientBias(model().named_parameters(), deltas, **options)
    yield "attach_prior", lambda **options: attach_prior(model(), deltas, **options)
    prior = Prior.from_mapping(deltas)
    yield "bias_gradients_", lambda **options: bias_gradients_(model().named_parameters(), prior, **options)


@pytest.mark.parametrize(("name", "make"), list(biases()), ids=lambda value: value if isinstance(value, str) else "")
def test_the_old_name_of_the_scaling_works_and_says_so(name: str, make: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = make(prior_scaling="absolute")
    with pytest.warns(DeprecationWarning, match=rf"{name}: scaling is deprecated, use prior_scaling instead") as caught:
        old = make(scaling="absolute")
    assert caught[0].filename == __file__
    if name == "bias_gradients_":
        assert new.cosine is None
        assert old.cosine is None, "absolute needs no statistics"
    else:
        assert old.param_groups == new.param_groups
    with pytest.raises(TypeError, match=f"{name} got both prior_scaling and its old name scaling"):
        make(scaling="absolute", prior_scaling="absolute")


def test_types_name_what_there_is() -> None:
    assert get_args(scalings.PriorScaling) == tuple(scalings.SCALINGS)
    assert get_args(scalings.GradientScaling) == scalings.GRADIENT_SCALINGS
    assert get_args(precision.StateDType) == tuple(precision.STATE_DTYPES)
    hints = get_type_hints(FusedDriftAdamW.__init__)
    assert hints["prior_scaling"] == scalings.PriorScaling
    assert hints["rounding"] == precision.Rounding
    assert hints["alpha"] == AlphaLike
    for public in (GradientBias.__init__, attach_prior, bias_gradients_):
        hints = get_type_hints(public)
        assert (hints["prior_scaling"], hints["alpha"]) == (scalings.GradientScaling, AlphaLike)
        assert hints.get("backend", backends.Name) == backends.Name


@pytest.mark.parametrize(("spelling", "dtype"), precision.STATE_DTYPES.items())
def test_state_dtypes_by_name(spelling: str, dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.ones(64, 64).bfloat16())
    param.grad = torch.ones_like(param)
    optimizer = FusedDriftAdamW([param], state_dtype=spelling, rounding="stochastic")
    optimizer.step()
    assert precision.held("exp_avg", optimizer.state[param]).dtype == dtype
