"""What a step consists of: its launches, cases without the coefficients' kernel, and the memory that launches read."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import grid
import pytest
import torch
from filled import SHAPES, UNKNOWN, Pair, Params, deltas_of, fills, models, on_backend
from problems import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from drift_kernels import FusedDriftAdamW
from drift_kernels.engine import pinned
from drift_kernels.kernels.filling import MAX_GROUPS

pytestmark = pytest.mark.skipif(
    grid.unavailable(DEVICE) is not None, reason="the kernels run on the host, where there is a C++ compiler"
)
begin = grid.begin


@pytest.fixture(autouse=True)
def kernels_on_the_host() -> Iterator[None]:
    with on_backend():
        yield


# Cases without the kernel


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
    """A parameter given twice takes two steps, in separate batches."""
    both, given = models(), fills(monkeypatch)

    def twice(params: Params) -> list[dict[str, Any]]:
        named = list(params.items())
        return [{"params": [*named, named[0]]}]

    with pytest.warns(UserWarning, match="duplicate parameters"):
        pair = Pair(both, twice, max_grad_norm=max_grad_norm)
    for step in range(1, 4):
        pair.step(monkeypatch)
        assert len(given) == step * expected


# What a step consists of

# torch's operations that launch nothing.
NOTHING = {
    *("alias", "as_strided", "detach", "expand", "select", "slice", "split", "t", "unbind", "view"),
    *("empty", "empty_like", "empty_strided"),
    *("_record_function_enter_new", "_record_function_exit"),
}


class Operations(TorchDispatchMode):
    """Records the operations that a device would have run."""

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
    """With one plan; with several, each has its own update, and sums if needed. Also with several groups, a learning
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
        if step > 1:  # the first makes the plans; the second makes them again, under the first scaler
            assert operations.names == []
            assert grid.launched().value - before == expected


def test_a_step_without_the_kernel_is_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that the count above detects launches."""
    monkeypatch.setattr(grid, "FILLS_COEFFICIENTS", False)
    params, _ = models()
    ours = FusedDriftAdamW(params.items(), prior=deltas_of(params), max_grad_norm=0.5, prior_scaling="adaptive_cosine")
    for _ in range(2):
        for p in params.values():
            p.grad = torch.randn_like(p)
        with Operations() as operations:
            ours.step()
    assert len(operations.names) > 30


# Pinned memory


def test_pinned_memory_is_kept_for_the_streams_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams, three steps. The allocator is notified when the last owner lets go, never during a capture."""
    current = iter(["one", "two", "one"])
    recorded: list[tuple[float, object]] = []

    def record(storage: torch.UntypedStorage, stream: object) -> None:
        recorded.append((float(torch.empty(0).set_(storage)[0]), stream))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(current))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(pinned, "_record", record)
    params, _ = models()
    ours = FusedDriftAdamW(params.items(), prior=deltas_of(params))
    for p in params.values():
        p.grad = torch.randn_like(p)
    ours.step()
    delta, other, readers = torch.full((3,), 7.0), torch.full((3,), 8.0), pinned.Readers()
    for tensor in (delta, other):
        readers.guard(tensor)
    (batch,) = ours._engine.batches
    monkeypatch.setattr(batch, "launches", batch.launches[:1])
    monkeypatch.setattr(batch, "_readers", {readers})
    for _ in range(3):
        ours.step()
    assert recorded == []
    owner = [delta]
    del delta
    gc.collect()
    assert recorded == []
    owner.clear()
    gc.collect()
    assert sorted(recorded) == [(7.0, "one"), (7.0, "two")]

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(pinned, "_kept", [])
    del tensor, other
    gc.collect()
    assert len(recorded) == 2
    assert [float(torch.empty(0).set_(storage)[0]) for storage in pinned._kept] == [8.0]


def test_what_launches_need_is_there_when_plans_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a capture, whatever the first step launches."""
    prepared: list[Any] = []
    monkeypatch.setattr(grid, "prepare", prepared.append)
    params, _ = models()
    ours = FusedDriftAdamW(params.items(), prior=deltas_of(params), alpha=0.0)
    for _ in range(2):
        for p in params.values():
            p.grad = torch.randn_like(p)
        ours.step()
    (batch,) = ours._engine.batches
    assert prepared == [launch.plan for launch in batch.launches]
