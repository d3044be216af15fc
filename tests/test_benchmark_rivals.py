"""The rivals of the step benchmark: they do the work they are timed for; and the memory of all contenders."""

from __future__ import annotations

import gc
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.step import contender, libraries, lineup, measure, memory, peers, streams
from benchmarks.step.modes import BY_LABEL, Mode
from benchmarks.step.problem import ADAMW, ALPHA, MAX_GRAD_NORM, Problem
from drift_kernels.kernels import backends
from drift_kernels.kernels.plan import Plan

CPU = torch.device("cpu")
BACKEND = "cpu" if backends.load("cpu").unavailable(CPU) is None else "reference"
SMALL = [
    ("model.layers.0.self_attn.q_proj.weight", (63, 17)),
    ("model.layers.0.self_attn.q_proj.bias", (63,)),
    ("model.layers.0.mlp.up_proj.weight", (1000, 3)),
    ("model.norm.weight", (17,)),
]
HOOK_SCALINGS = peers.SCALINGS["hook"]


def problem_at_zero() -> Problem:
    """A problem with zero parameters, so that float32 shows every digit of an update, and gradients that get
    clipped."""
    seed = int(torch.randint(2**31, ()))
    problem = Problem.random(SMALL, ["attn", "mlp"], torch.float32, CPU, seed)
    return replace(
        problem,
        params=[torch.zeros_like(param) for param in problem.params],
        grads=[1000 * grad for grad in problem.grads],
        deltas=[None if delta is None else 1000 * delta for delta in problem.deltas],
    )


def biased_by_the_paper(grad: Tensor, delta: Tensor, scaling: str) -> Tensor:
    """The biased gradient as in arXiv 2510.15050, in float64."""
    g, d = grad.double(), delta.double()
    if scaling == "absolute":
        return g - ALPHA * d
    g_norm, d_norm = g.norm().clamp(min=1e-12), d.norm().clamp(min=1e-12)
    cosine = ((g * d).sum() / (g_norm * d_norm)).clamp(-1, 1)
    strength = ALPHA * (cosine + 1) / 2 if scaling == "adaptive_cosine" else ALPHA
    return g - strength * g_norm * d / d_norm


@pytest.mark.parametrize("scaling", HOOK_SCALINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_authors_hook_is_the_paper(scaling: str, dtype: torch.dtype, tolerance: float) -> None:
    grad, delta = torch.randn(63, 17).to(dtype), torch.randn(63, 17).to(dtype)
    biased = peers.authors_hook(delta, ALPHA, scaling)(grad)
    expected = biased_by_the_paper(grad, delta, scaling)
    assert biased.dtype == dtype
    assert (biased.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("scaling", HOOK_SCALINGS)
def test_authors_hook_gives_the_same_in_a_backward(scaling: str) -> None:
    weight, grad, delta = torch.randn(7, 9, requires_grad=True), torch.randn(7, 9), torch.randn(7, 9)
    biased = peers.authors_hook(delta, ALPHA, scaling)
    weight.register_hook(biased)
    (weight * grad).sum().backward()
    assert torch.equal(weight.grad, biased(grad))


@pytest.mark.parametrize("scaling", HOOK_SCALINGS)
def test_authors_hook_bears_zeros(scaling: str) -> None:
    zeros, some = torch.zeros(5), torch.randn(5)
    assert torch.equal(peers.authors_hook(zeros, ALPHA, scaling)(some), some)
    assert peers.authors_hook(some, ALPHA, scaling)(zeros).isfinite().all()


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Run the compiled rival's function uncompiled: the compiled one has its own test."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("rival", "scaling"), [(rival, scaling) for rival, scalings in peers.SCALINGS.items() for scaling in scalings]
)
def test_a_rival_does_the_same_work_as_ours(rival: str, scaling: str, clip: bool) -> None:
    problem = problem_at_zero()
    assert_same_work(peers.WITH_PRIOR[rival](problem, scaling, clip), problem, scaling, clip)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("rival", peers.WITHOUT_PRIOR)
def test_a_rival_clips_as_ours(rival: str) -> None:
    problem = problem_at_zero()
    assert_same_work(peers.WITHOUT_PRIOR[rival](problem, clip=True), problem, None, True)


def test_the_compiled_rival_does_the_same_work_and_compiles_once() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    problem = problem_at_zero()
    compiled = peers.compiled(problem, "adaptive_cosine", clip=True)
    for _ in range(3):
        compiled.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    ours = contender.drift(problem, BACKEND, "adaptive_cosine", Mode(torch.float32), clip=True)
    for _ in range(3):
        ours.step()
    assert_same_states(ours, compiled, with_params=False)
    assert next(iter(compiled.optimizer.state.values()))["step"] == 3


def assert_same_work(theirs: contender.Contender, problem: Problem, scaling: str | None, clip: bool) -> None:
    ours = contender.drift(problem, BACKEND, scaling, Mode(torch.float32), clip)
    assert (theirs.scaling, theirs.clip, theirs.bytes) == (scaling, clip, ours.bytes)
    for _ in range(3):
        for one in (theirs, ours):
            one.prepare()
            one.step()
    if clip:
        assert float(ours.optimizer.grad_norm) > 2 * MAX_GRAD_NORM
    # A bias in exp_avg cancels some of its elements, and an update magnifies their rounding errors.
    assert_same_states(ours, theirs, with_params=scaling in (None, "decoupled"))


def assert_same_states(ours: contender.Contender, theirs: contender.Contender, with_params: bool) -> None:
    for own, other in zip(parameters(ours), parameters(theirs), strict=True):
        mine, expected = ours.optimizer.state[own], theirs.optimizer.state[other]
        pairs = [(mine[key], expected[key]) for key in ("exp_avg", "exp_avg_sq")]
        pairs += [(own, other)] if with_params else []
        for a, b in pairs:
            assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def all_entries(our_modes: list[Mode], dtype: torch.dtype = torch.float32) -> list[lineup.Entry]:
    names = [*peers.WITHOUT_PRIOR, *peers.WITH_PRIOR]
    return lineup.entries(names, [BACKEND], [], list(lineup.SCALINGS), [False, True], dtype, our_modes, CPU)


@pytest.mark.usefixtures("uncompiled")
def test_contenders_share_gradients_but_not_parameters() -> None:
    problem = problem_at_zero()
    grads = [grad.clone() for grad in problem.grads]
    contenders = [entry.make(problem) for entry in all_entries([Mode(torch.float32)])]
    names = {(one.name, one.scaling, one.clip) for one in contenders}
    assert len(names) == len(contenders) == 2 * (2 + 4 + 3 + 4 + 5)
    first_params = [parameters(one)[0].data_ptr() for one in contenders]
    assert len(set(first_params)) == len(contenders)
    measure.measure(contenders, CPU, reps=2)
    assert all(map(torch.equal, problem.grads, grads))
    next(one for one in contenders if one.name == "foreach_bias" and one.scaling == "absolute").step()
    assert not any(map(torch.equal, problem.scratch_grads[:3], grads[:3]))
    problem.restore_scratch_grads()
    assert all(map(torch.equal, problem.scratch_grads, grads))


def parameters(one: contender.Contender) -> list[Tensor]:
    assert one.optimizer is not None
    return one.optimizer.param_groups[0]["params"]


@pytest.mark.skipif(BACKEND != "cpu" or streams.compiler() is None, reason="needs the cpu backend and a compiler")
@pytest.mark.parametrize("label", ["bf16 states", "fp32 states, master", "int8 states, stochastic, int8 prior"])
@pytest.mark.parametrize("scaling", [None, "gradnorm"])
def test_streams_visit_every_buffer_of_a_step_and_leave_its_values(
    label: str, scaling: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem.random(MEDIUM, ["mlp"], torch.bfloat16, CPU)
    ours = contender.drift(problem, BACKEND, scaling, BY_LABEL[label])
    ours.step()
    kept = [t for state in ours.optimizer.state.values() for key, t in state.items() if key != "step"]
    kept += parameters(ours)
    before = [t.clone() for t in kept]
    swept: list[tuple[bool, bool]] = []
    sweep = streams._sweep

    def recorded(plan: Plan, with_delta: bool, writes: bool) -> None:
        swept.append((with_delta, writes))
        sweep(plan, with_delta, writes)

    monkeypatch.setattr(streams, "_sweep", recorded)
    limit = streams.streams(ours)
    limit.step()
    assert all(map(torch.equal, kept, before))
    assert (limit.bytes, limit.mode, limit.scaling) == (ours.bytes, ours.mode, scaling)
    assert any(writes for _, writes in swept)
    assert any(not writes for _, writes in swept) == (scaling == "gradnorm")
    assert any(with_delta for with_delta, _ in swept) == (scaling is not None)
    ours.step()
    assert not all(map(torch.equal, kept, before))


@pytest.mark.skipif(
    BACKEND != "cpu" or sys.platform != "linux" or platform.machine() != "x86_64", reason="x86-64 Linux"
)
def test_counted_instructions_are_those_of_the_kernels_alone() -> None:
    """The interpreter's, whose number varies from run to run, are not counted: twice the work is exactly twice as
    many."""
    from benchmarks.step import instructions

    totals = torch.zeros(64, dtype=torch.int64), torch.zeros(16, dtype=torch.int64)
    words = torch.ones(64, 16, dtype=torch.int64)

    def sum_words(times: int) -> None:
        for _ in range(times):
            addresses = (tensor.data_ptr() for tensor in totals)
            instructions._cpu.sum_words(words.data_ptr(), 64, 16, *addresses)

    try:
        once, twice, again = (instructions.count(partial(sum_words, times)) for times in (1, 2, 1))
    except OSError as refused:
        pytest.skip(str(refused))
    assert again == once > 64 * 16 / 8
    assert twice == 2 * once


# Memory

MEDIUM = [(f"model.layers.{i}.mlp.up_proj.weight", (257 + 64 * i, 301)) for i in range(5)] + [("norm.weight", (90001,))]


def live_storages() -> dict[int, int]:
    """The bytes of every storage used by a tensor of this process, by address."""
    gc.collect()
    tensors = [obj for obj in gc.get_objects() if type(obj) is Tensor and obj.device == CPU]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr()}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_that_a_run_needs_is_known_before(dtype: torch.dtype) -> None:
    labels = ["fp32 states", "bf16 states", "int8 states"]
    if dtype == torch.bfloat16:
        labels += ["fp32 states, master, fp8 prior", "int8 states, stochastic, int8 prior"]
    entries = all_entries([BY_LABEL[label] for label in labels], dtype)
    estimate = lineup.kept_bytes(MEDIUM, ["mlp"], dtype, entries, with_copy=True)
    before = live_storages()
    problem = Problem.random(MEDIUM, ["mlp"], dtype, CPU)
    contenders = [contender.copy(problem), *(entry.make(problem) for entry in entries)]
    for one in contenders:
        one.prepare()
        one.step()
    allocated = sum(size for address, size in live_storages().items() if address not in before)
    assert estimate == pytest.approx(allocated, rel=0.01)
    assert len(contenders) == 1 + len(entries)


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_state_bytes_are_the_states_and_the_deltas(states: torch.dtype) -> None:
    problem = Problem.random(MEDIUM, ["mlp"], torch.bfloat16, CPU)
    biased = sum(delta.numel() for delta in problem.prior.values())
    for scaling, deltas in ((None, 0), ("absolute", 2 * biased)):
        ours = contender.drift(problem, BACKEND, scaling, Mode(states))
        ours.step()
        steps = memory.state_bytes(ours) - 2 * states.itemsize * problem.numel - deltas
        assert 0 < steps <= 64 * len(MEDIUM)
    assert memory.state_bytes(contender.copy(problem)) is None


def test_state_bytes_finds_what_libraries_wrap() -> None:
    class Quantized:
        def __init__(self) -> None:
            self.values, self.scales = torch.zeros(1000, dtype=torch.uint8), torch.zeros(8)

    param, table = torch.zeros(1000), torch.zeros(256)
    optimizer = torch.optim.SGD([param])
    optimizer.state[param] = {"step": 1, "exp_avg": Quantized(), "pair": [torch.zeros(7), {"map": table}], "map": table}
    one = contender.Contender("x", "x", None, None, 0, step=lambda: None, optimizer=optimizer, deltas=[table[:5]])
    assert memory.state_bytes(one) == 1000 + 32 + 28 + 1024


# Other libraries


def test_a_library_that_is_not_there_is_left_out_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = torch.device("cuda")
    missing = libraries.Library("Missing", "no_such_library.optim.AdamW", libraries.LIBRARIES["bnb"].states)
    monkeypatch.setattr(libraries, "LIBRARIES", {"missing": missing})
    assert lineup.chosen_libraries(None, gpu, torch.bfloat16) == []
    assert capsys.readouterr().err == "Left out: Missing: ModuleNotFoundError: No module named 'no_such_library'\n"
    assert lineup.chosen_libraries(["missing"], CPU, torch.bfloat16) == []
    assert "GPUs only" in capsys.readouterr().err


def test_a_library_is_built_with_the_hyperparameters_of_all_and_tried() -> None:
    states = libraries.LIBRARIES["torchao"].states
    works = libraries.Library("torch", "torch.optim.AdamW", states, {"fused": True})
    group = works.build([torch.zeros(3)]).param_groups[0]
    assert {key: group[key] for key in (*ADAMW, "fused")} == {**ADAMW, "fused": True}
    assert libraries.probe(works, CPU, torch.bfloat16) is None
    broken = libraries.Library("torch", "torch.optim.AdamW", states, {"no_such_option": 1})
    assert "no_such_option" in libraries.probe(broken, CPU, torch.bfloat16)


@pytest.mark.parametrize("clip", [False, True])
def test_a_library_is_a_rival_without_a_prior(clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library = libraries.Library("torch", "torch.optim.AdamW", libraries.LIBRARIES["torchao"].states)
    monkeypatch.setattr(libraries, "LIBRARIES", {"library": library})
    problem = problem_at_zero()
    (entry,) = [
        entry
        for entry in lineup.entries([], [], ["library"], ["absolute"], [clip], torch.float32, [], CPU)
        if entry.name == "library"
    ]
    assert_same_work(entry.make(problem), problem, None, clip)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [("bnb", 8, 8), ("bnb_8bit", 2, 2), ("torchao", 4, 8), ("optimi", 6, 8), ("flashoptim", 3, 3), ("te", 8, 8)],
)
def test_states_of_libraries(name: str, bf16: int, fp32: int) -> None:
    library = libraries.LIBRARIES[name]
    assert (library.state_bytes(torch.bfloat16), library.state_bytes(torch.float32)) == (bf16, fp32)
