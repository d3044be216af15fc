"""Our modes in the step benchmark: which exist, what they store and move, their parity, a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.step import bars, command, contender, memory, modes, roofline
from benchmarks.step.modes import BY_LABEL, Mode, Storage
from benchmarks.step.parity import ParityError, check_parity
from benchmarks.step.problem import Problem
from drift_kernels import FusedDriftAdamW
from drift_kernels.kernels import backends

CPU = torch.device("cpu")
BACKEND = "cpu" if backends.load("cpu").unavailable(CPU) is None else "reference"
F32, BF16, F16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
FP8 = torch.float8_e4m3fn
SIZE = ["--model", "qwen2.5-0.5b", "--params", "2M", "--reps", "2", "--contenders", BACKEND]

# Without a delta; too small for codes; two blocks of codes beside 31 whole ones.
SHAPES = [("norm.weight", (5000,)), ("model.layers.0.mlp.up_proj.weight", (4095,)), ("mlp.down_proj.weight", (3969,))]
SHAPES += [(f"model.layers.{i}.mlp.up_proj.weight", (61 + i, 70)) for i in range(1, 4)]
EVERY_BF16 = [mode for mode in BY_LABEL.values() if mode.refusal(BF16) is None]

# Which exist


def test_labels() -> None:
    assert Mode(F32).label == "fp32 states"
    assert Mode(BF16, master=True).label == "bf16 states, master"
    assert Mode(INT8, "stochastic", prior=INT8).label == "int8 states, stochastic, int8 prior"
    assert Mode(BF16, "stochastic", True, FP8).label == "bf16 states, stochastic, master, fp8 prior"
    assert Mode(BF16, prior_on_host=True).label == "bf16 states, host prior"
    assert len(BY_LABEL) == 3 * 2 * 2 * 3 * 2


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("label", BY_LABEL)
def test_a_mode_that_is_not_refused_steps(label: str, dtype: torch.dtype) -> None:
    mode = BY_LABEL[label]
    problem = Problem.random(SHAPES[-1:], ["all"], dtype, CPU)
    if mode.refusal(dtype) is None:
        ours = contender.drift(problem, BACKEND, "absolute", mode)
        ours.step()
        assert isinstance(ours.optimizer, FusedDriftAdamW)
        param = ours.optimizer.param_groups[0]["params"][0]
        assert ("param_residual" in ours.optimizer.state[param]) == mode.master


@contextmanager
def refusing(capsys: pytest.CaptureFixture[str], words: str) -> Iterator[None]:
    with pytest.raises(SystemExit):
        yield
    assert words in capsys.readouterr().err


def chosen(*options: str) -> list[str]:
    parser = command.make_parser()
    return [mode.label for mode in command.chosen_modes(parser, parser.parse_args(options))]


def test_options_are_combined(capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen() == ["bf16 states", "fp32 states"]
    assert chosen("--states", "int8", "int8", "--prior-dtype", "same", "fp8") == [
        "int8 states",
        "int8 states, fp8 prior",
    ]
    assert chosen("--modes", "fp32 states, master", "int8 states") == ["fp32 states, master", "int8 states"]
    assert capsys.readouterr().err == ""
    with refusing(capsys, "--modes cannot be combined with"):
        chosen("--modes", "int8 states", "--master", "no")


def test_what_does_not_exist_is_left_out_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    everything = ["--rounding", "nearest", "stochastic", "--master", "no", "yes", "--prior-dtype", *modes.PRIORS]
    assert chosen("--dtype", "float32", *everything) == ["fp32 states"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Left out: fp32 states, int8 prior; fp32 states, fp8 prior; fp32 states, master;")
    assert line.endswith(": stochastic rounding, master weights and small priors need bfloat16 parameters")
    assert len(chosen("--states", *modes.STATES, *everything)) == len(EVERY_BF16) == 36 - 6
    assert "Left out: fp32 states, stochastic, master; " in capsys.readouterr().err
    assert chosen("--dtype", "float16", "--states", "float32", "int8") == ["fp32 states"]
    gpu = ["--device", "cuda", "--prior-device", "same", "cpu", "--prior-dtype", "int8"]
    assert chosen("--states", "bfloat16", *gpu) == ["bf16 states, int8 prior", "bf16 states, int8 host prior"]
    assert chosen("--states", "bfloat16", *gpu[2:]) == ["bf16 states, int8 prior"]
    assert "int8 host prior: a prior on the host needs a GPU" in capsys.readouterr().err
    with refusing(capsys, "no mode is left for float16 parameters. int8 states: int8 states need"):
        chosen("--dtype", "float16", "--states", "int8")


# What they store and move


@pytest.mark.parametrize(
    ("mode", "states", "delta"),
    [
        (Mode(F32), {1: 8, 4096: 8 * 4096}, {1: 2, 4096: 8192}),
        (Mode(BF16, "stochastic"), {1: 4, 4096: 4 * 4096}, {1: 2, 4096: 8192}),
        (Mode(BF16, master=True), {1: 6, 4096: 6 * 4096}, {1: 2, 4096: 8192}),
        (Mode(INT8), {4095: 8 * 4095, 4096: 2 * (4096 + 4 * 32), 4097: 2 * (4097 + 4 * 33)}, {1: 2}),
        (Mode(INT8, master=True), {4095: 10 * 4095, 4096: 4 * 4096 + 2 * 4 * 32}, {1: 2}),
        (Mode(F32, prior=INT8), {1: 8}, {1: 1 + 4, 128: 128 + 4, 129: 129 + 8}),
        (Mode(F32, prior=FP8), {1: 8}, {0: 0, 4097: 4097 + 4 * 33}),
    ],
)
def test_bytes_that_a_tensor_takes(mode: Mode, states: dict[int, int], delta: dict[int, int]) -> None:
    storage = mode.storage(BF16)
    assert {numel: storage.states(numel) for numel in states} == states
    assert {numel: storage.delta(numel) for numel in delta} == delta


def test_a_prior_of_float16_parameters_is_float32() -> None:
    assert [Mode(F32).storage(dtype).delta(10) for dtype in (F32, BF16, F16)] == [40, 20, 40]


def test_bytes_that_a_mode_moves() -> None:
    numel, blocks = 129 * 64, 65
    problem = Problem.random([("layers.0.mlp.up_proj.weight", (129, 64))], ["all"], BF16, CPU)

    def moved(mode: Mode, scaling: str | None = "absolute", clip: bool = False) -> int:
        return problem.bytes_to_move(scaling, mode.storage(BF16), clip)

    small = Mode(INT8, "stochastic", prior=INT8)
    assert moved(Mode(F32)) == 24 * numel
    assert moved(Mode(BF16, "stochastic")) == moved(Mode(BF16)) == 16 * numel
    assert moved(Mode(F32, master=True)) == 28 * numel
    assert moved(small) == 11 * numel + 5 * 4 * blocks  # scales: two states read and written, the delta read
    assert moved(small, None) == 10 * numel + 4 * 4 * blocks
    assert moved(small, "adaptive_cosine") == 14 * numel + 6 * 4 * blocks
    assert moved(small, "decoupled", clip=True) == 13 * numel + 5 * 4 * blocks
    assert moved(small) < 0.5 * moved(Mode(F32))


@pytest.mark.parametrize("mode", EVERY_BF16, ids=lambda mode: mode.label)
def test_a_mode_stores_what_it_is_said_to(mode: Mode) -> None:
    problem = Problem.random(SHAPES, ["mlp"], BF16, CPU)
    storage = mode.storage(BF16)
    states = sum(storage.states(param.numel()) for param in problem.params)
    deltas = sum(storage.delta(delta.numel()) for delta in problem.prior.values())
    for scaling, prior in ((None, 0), ("absolute", deltas)):
        ours = contender.drift(problem, BACKEND, scaling, mode)
        ours.step()
        found = memory.Memory.of(ours, CPU)
        steps = 4 * len(SHAPES)
        assert found == (states + prior + steps, 2 * problem.numel + states + prior + steps, None)


def test_small_priors_are_shared_by_the_contenders_that_have_them() -> None:
    problem = Problem.random(SHAPES, ["mlp"], BF16, CPU)
    a, b = (contender.drift(problem, BACKEND, "absolute", Mode(states, prior=FP8)) for states in (F32, INT8))
    assert [delta.data_ptr() for delta in a.deltas] == [delta.data_ptr() for delta in b.deltas]
    assert {delta.dtype for delta in a.deltas} == {FP8, F32}


# Parity


@pytest.mark.parametrize("label", ["fp32 states", "bf16 states, stochastic, master", "int8 states, master, fp8 prior"])
def test_parity_is_green(label: str) -> None:
    check_parity(BACKEND, CPU, BF16, BY_LABEL[label])


@pytest.mark.parametrize(
    ("operand", "key", "mode"),
    [
        ("residual", "param_residual", Mode(F32, master=True)),
        ("exp_avg_sq_scale", "exp_avg_sq_scale", Mode(INT8)),
        ("exp_avg_sq", "exp_avg_sq_codes", Mode(INT8, "stochastic", prior=INT8)),
    ],
)
def test_parity_sees_a_wrong_bit_of_what_a_mode_adds(
    operand: str, key: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, reference = backends.load("cpu"), backends.load("reference")

    def wrong(plan, coefficients, *, with_delta) -> None:
        reference.update(plan, coefficients, with_delta=with_delta)
        tensor = getattr(plan.operands[-1], operand)
        if tensor is not None:
            tensor.view(-1).view(torch.uint8)[-1:].bitwise_xor_(1)

    monkeypatch.setattr(backend, "unavailable", lambda device: None)
    monkeypatch.setattr(backend, "READS_TENSORS", True)  # as the reference, which it is made to be
    monkeypatch.setattr(backend, "grad_stats", reference.grad_stats)
    monkeypatch.setattr(backend, "update", wrong)
    with pytest.raises(ParityError, match=rf"{mode.label}, scaling none.*: {key} differs"):
        check_parity("cpu", CPU, BF16, mode)


def test_parity_sees_a_wrong_small_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, reference = backends.load("cpu"), backends.load("reference")

    def wrong(plan, out, *, with_delta) -> None:
        reference.grad_stats(plan, out, with_delta=with_delta)
        if with_delta and plan.operands[0].delta_scale is not None:
            out[:, 1] += 0.01 * out[:, 0]

    monkeypatch.setattr(backend, "unavailable", lambda device: None)
    monkeypatch.setattr(backend, "READS_TENSORS", True)  # as the reference, which it is made to be
    monkeypatch.setattr(backend, "grad_stats", wrong)
    monkeypatch.setattr(backend, "update", reference.update)
    check_parity("cpu", CPU, BF16, Mode(INT8))
    with pytest.raises(ParityError, match=r"fp8 prior, scaling adaptive_cosine.*exp_avg differs"):
        check_parity("cpu", CPU, BF16, Mode(INT8, prior=FP8))


# End to end


def test_a_run_of_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = [tmp_path / "rows.json", tmp_path / "bars.png", tmp_path / "roofline.png"]
    labels = ["fp32 states", "fp32 states, master", "int8 states, stochastic", "int8 states, stochastic, int8 prior"]
    wanted = ["--scaling", "none", "absolute", "--modes", *labels]
    files = ["--json", str(output[0]), "--plot", str(output[1]), "--roofline", str(output[2])]
    assert command.main([*SIZE, *wanted, *files]) == 0

    rows = json.loads(output[0].read_text())
    keys = ("states", "rounding", "master", "prior_dtype", "prior_device")
    found = [tuple(row[key] for key in keys) for row in rows]
    assert found == [
        (None, None, None, None, None),
        ("bfloat16", None, None, None, None),
        ("float32", "nearest", False, None, None),
        ("float32", "nearest", True, None, None),
        ("int8", "stochastic", False, None, None),  # only once: without a prior, a small prior makes no difference
        ("float32", "nearest", False, "same", "same"),
        ("float32", "nearest", True, "same", "same"),
        ("int8", "stochastic", False, "same", "same"),
        ("int8", "stochastic", False, "int8", "same"),
    ]
    assert [modes.label_of(row) for row in rows] == ["", "bf16 states", *labels[:3], *labels]
    copy, fused, *ours = rows
    assert copy["stored_bytes"] is None
    assert fused["stored_bytes"] / fused["params"] == pytest.approx(6, rel=0.01)
    params = fused["params"]
    assert ours[-4]["stored_bytes"] - ours[0]["stored_bytes"] == 2 * params
    assert ours[-3]["stored_bytes"] - ours[-4]["stored_bytes"] == 2 * params
    assert ours[-4]["bytes"] == 24 * params
    assert ours[-3]["bytes"] == 28 * params
    assert ours[-1]["bytes"] < ours[-2]["bytes"] < ours[0]["bytes"]

    table = capsys.readouterr().out
    assert "stored" in table
    assert all(label in table for label in labels)
    for path, draw in zip(output[1:], (bars, roofline), strict=True):
        assert path.read_bytes().startswith(b"\x89PNG")
        draw.main([str(output[0]), str(path)])


def test_labels_of_rows_that_know_no_modes() -> None:
    assert modes.label_of({"states": "float32"}) == "fp32 states"
    assert modes.label_of({"states": "uint8", "rounding": None}) == "8-bit states"
    assert modes.label_of({"states": None}) == ""


def test_storage_of_rivals_is_so_many_bytes_an_element() -> None:
    plain = Storage.plain(3, 2)
    assert (plain.states(7), plain.delta(7)) == (21, 14)
