"""capturable=True: values read by the device, CUDA graph replays, and steps that cannot be captured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from drift_kernels import AlphaScheduler, FusedDriftAdamW, linear_anneal, optimizer
from drift_kernels.engine import engine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALINGS = ["absolute", "gradnorm", "adaptive_cosine", "decoupled"]
SHAPES = {"layers.0.weight": (33, 65), "layers.0.bias": (33,), "norm.weight": (7,)}
Params = dict[str, nn.Parameter]


def make(dtype: torch.dtype = torch.float32) -> tuple[Params, Params, dict[str, torch.Tensor]]:
    """Two equal models, and deltas for the first two of their parameters."""
    params = {name: nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for name, shape in SHAPES.items()}
    deltas = {name: torch.randn_like(p) for name, p in list(params.items())[:2]}
    return params, {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}, deltas


def set_grads(*models: Params) -> None:
    """Give every model the same fresh gradients, in the memory of the previous ones."""
    for name in models[0]:
        grad = torch.randn_like(models[0][name])
        for params in models:
            if params[name].grad is None:
                params[name].grad = torch.empty_like(grad)
            params[name].grad.copy_(grad)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device=DEVICE)


@contextmanager
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host reads no tensor in this context."""
    with monkeypatch.context() as patch:
        for reading in ("item", "__float__", "__bool__", "tolist"):
            patch.setattr(torch.Tensor, reading, lambda self: pytest.fail("the host read a tensor"))
        yield


@pytest.mark.parametrize("tensors", [("lr", "alpha"), ("lr",), ("alpha",)])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_tensors_are_followed_and_never_read_by_the_host(
    scaling: str, max_grad_norm: float | None, tensors: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, others, deltas = make()
    first = {"lr": 1e-2, "alpha": 0.5}
    given = {key: scalar(value) if key in tensors else value for key, value in first.items()}
    common = {"prior": deltas, "prior_scaling": scaling, "max_grad_norm": max_grad_norm}
    ours = FusedDriftAdamW(params.items(), capturable=True, **given, **common)
    numbers = FusedDriftAdamW(others.items(), **first, **common)
    for step in range(4):
        set_grads(params, others)
        if step == 0:
            ours.step()  # builds tables, from the host
        else:
            with nothing_is_read(monkeypatch):
                ours.step()
        numbers.step()
        (group,), (of_numbers,) = ours.param_groups, numbers.param_groups
        for key in tensors:
            of_numbers[key] = {"lr": 1e-2 / (step + 2), "alpha": 0.5 * step}[key]
            group[key].fill_(of_numbers[key])
    for name, p in params.items():
        assert torch.equal(p, others[name]), name
        assert ours.state[p]["step"].device.type == DEVICE.type


@pytest.mark.parametrize("key", ["lr", "alpha"])
def test_a_tensor_may_give_way_to_a_number_and_come_back(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that the tensor holds by then, which is not what the last step read in it; and a tensor of the number
    that the last step had, filled afterwards. Neither is compared by the host."""
    params, others, deltas = make()
    common = {"prior": deltas, "prior_scaling": "absolute", "lr": 1e-2, "alpha": 0.5}
    ours = FusedDriftAdamW(params.items(), capturable=True, **common)
    numbers = FusedDriftAdamW(others.items(), **common)
    tensor = scalar(0.25)
    for given, value in ((tensor, 0.25), (0.125, 0.125), (tensor, 0.125), (tensor, 0.5)):
        tensor.fill_(value)
        ours.param_groups[0][key], numbers.param_groups[0][key] = given, value
        set_grads(params, others)
        with nothing_is_read(monkeypatch) if ours.state else nullcontext():  # the first builds tables
            ours.step()
        numbers.step()
        for name, p in params.items():
            assert torch.equal(p, others[name]), (name, value)


def test_an_alpha_of_zero_in_a_tensor_is_plain_adamw() -> None:
    params, others, deltas = make()
    ours = FusedDriftAdamW(params.items(), prior=deltas, alpha=scalar(0.0), capturable=True)
    plain = FusedDriftAdamW(others.items())
    for _ in range(3):
        set_grads(params, others)
        ours.step()
        plain.step()
    for name, p in params.items():
        assert torch.equal(p, others[name]), name


def test_schedulers_fill_tensors_in_place() -> None:
    params, _, deltas = make()
    lr, alpha = scalar(1.0), scalar(3.0)
    ours = FusedDriftAdamW(params.items(), lr=lr, prior=deltas, alpha=alpha, capturable=True)
    schedules = (AlphaScheduler(ours, linear_anneal(4)), torch.optim.lr_scheduler.LambdaLR(ours, lambda t: 0.5**t))
    seen = []
    for _ in range(3):
        set_grads(params)
        ours.step()
        for schedule in schedules:
            schedule.step()
        seen.append((float(lr), float(alpha)))
    assert seen == [(0.5, 2.25), (0.25, 1.5), (0.125, 0.75)]
    assert ours.param_groups[0]["lr"] is lr
    assert ours.param_groups[0]["alpha"] is alpha
    assert schedules[0].get_last_alpha() == [0.75]


def test_a_tensor_must_be_where_its_parameters_are() -> None:
    params, _, _ = make()
    elsewhere = torch.tensor(1e-3, device="meta")
    with pytest.raises(ValueError, match=r"lr must be a number, or a tensor on the device of its parameters.*on meta"):
        FusedDriftAdamW(params.items(), lr=elsewhere, capturable=True)


def capture_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that a graph is being captured."""
    for module in (engine, optimizer):
        monkeypatch.setattr(module, "capturing", lambda: True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capturable": False, "backend": "reference"}, r"requires capturable=True \(group 0\)"),
        ({"capturable": True, "backend": "cpu"}, r"cannot capture a step of drift_kernels\.kernels\.cpu"),
    ],
)
def test_what_cannot_be_captured(options: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("a substitute for machines without a GPU")
    params, _, _ = make()
    ours = FusedDriftAdamW(params.items(), **options)
    set_grads(params)
    before = {name: p.detach().clone() for name, p in params.items()}
    capture_nothing(monkeypatch)
    with pytest.raises(RuntimeError, match="run a step before capturing one"):
        ours.step()
    monkeypatch.undo()
    assert all(torch.equal(params[name], p) for name, p in before.items())
    ours.step()
    capture_nothing(monkeypatch)
    with pytest.raises(RuntimeError, match=words):
        ours.step()


def test_a_captured_number_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    params, _, deltas = make()
    ours = FusedDriftAdamW(
        params.items(), lr=0.25, prior=deltas, alpha=scalar(1.0), capturable=True, backend="reference"
    )
    set_grads(params)
    ours.step()
    capture_nothing(monkeypatch)
    ours.step()
    messages = [record.getMessage() for record in caplog.records if "captured" in record.getMessage()]
    assert messages == [
        "every replay of the captured step uses lr=0.25; pass a tensor to change it (group 0)",
    ]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, math.inf])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_replays_are_the_eager_steps(
    backend: str, scaling: str, max_grad_norm: float | None, dtype: torch.dtype
) -> None:
    """lr, alpha, the step count and the gradients' values change between replays; their addresses after the capture."""
    params, others, deltas = make(dtype)
    lr, alpha = scalar(1e-2), scalar(0.5)
    common = {"prior": deltas, "prior_scaling": scaling, "max_grad_norm": max_grad_norm, "backend": backend}
    captured = FusedDriftAdamW(params.items(), lr=lr, alpha=alpha, capturable=True, **common)
    eager = FusedDriftAdamW(others.items(), lr=1e-2, alpha=0.5, **common)

    def both(step: Callable[[], object], at: int) -> None:
        set_grads(params, others)
        for group in eager.param_groups:
            group["lr"], group["alpha"] = 1e-2 / (at + 1), 0.5 * at
        lr.fill_(1e-2 / (at + 1))
        alpha.fill_(0.5 * at)
        step()
        eager.step()
        for name, p in params.items():
            assert torch.equal(p, others[name]), f"{name}, step {at}"
        if max_grad_norm is not None:
            assert captured.grad_norm is not None
            assert torch.equal(captured.grad_norm, eager.grad_norm)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(captured.step, 1)
    torch.cuda.current_stream().wait_stream(side)
    for p in params.values():
        p.grad = torch.empty_like(p)  # at addresses new to the optimizer
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for at in range(2, 6):
        both(graph.replay, at)
    assert {float(state["step"]) for state in captured.state.values()} == {5.0}
