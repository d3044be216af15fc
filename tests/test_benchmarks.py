"""The step benchmark: its parameter lists, its rivals, its check before measuring, and one small run end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import contender, measure, peers, shapes, step
from benchmarks.parity import ParityError, check_parity
from benchmarks.problem import ALPHA, Problem
from drift_kernels import backends

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
    """Parameters of zero, so that float32 shows every digit of an update."""
    seed = int(torch.randint(2**31, ()))
    problem = Problem.random(SMALL, ["attn", "mlp"], torch.float32, CPU, seed)
    return replace(problem, params=[torch.zeros_like(param) for param in problem.params])


# Parameter lists


@pytest.mark.parametrize(
    ("model", "tensors", "params"),
    [("qwen2.5-vl-7b", 729, 8_292_166_656), ("qwen2.5-vl-3b", 824, 3_754_622_976), ("qwen2.5-0.5b", 290, 494_032_768)],
)
def test_published_sizes(model: str, tensors: int, params: int) -> None:
    named_shapes = shapes.named_shapes(model)
    assert (len(named_shapes), shapes.numel(named_shapes)) == (tensors, params)


@pytest.mark.parametrize("model", shapes.MODELS)
def test_parameters_are_those_of_transformers(model: str) -> None:
    transformers = pytest.importorskip("transformers")
    text, vision = shapes.MODELS[model].text, shapes.MODELS[model].vision
    head = 64 if model == "qwen2.5-0.5b" else 128
    text_config = {
        "hidden_size": text.hidden,
        "intermediate_size": text.intermediate,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.hidden // head,
        "num_key_value_heads": text.kv // head,
        "vocab_size": text.vocabulary,
        "tie_word_embeddings": text.tied,
    }
    with torch.device("meta"):
        if vision is None:
            config = transformers.Qwen2Config(**text_config)
            live = transformers.Qwen2ForCausalLM(config)
        else:
            vision_config = {
                "hidden_size": vision.hidden,
                "intermediate_size": vision.intermediate,
                "depth": vision.layers,
                "out_hidden_size": text.hidden,
            }
            config = transformers.Qwen2_5_VLConfig(
                text_config=text_config, vision_config=vision_config, tie_word_embeddings=text.tied
            )
            live = transformers.Qwen2_5_VLForConditionalGeneration(config)
    assert shapes.named_shapes(model) == [(name, tuple(p.shape)) for name, p in live.named_parameters()]


@pytest.mark.parametrize("model", shapes.MODELS)
def test_fit_keeps_the_tensors_and_reaches_the_target(model: str) -> None:
    full = shapes.named_shapes(model)
    fitted = shapes.named_shapes(model, shapes.fit(model, 64_000_000))
    assert 0.97 * 64e6 < shapes.numel(fitted) <= 64e6
    assert [(name, len(shape)) for name, shape in fitted] == [(name, len(shape)) for name, shape in full]


def test_fit_refuses_what_no_scale_reaches() -> None:
    with pytest.raises(ValueError, match="at least"):
        shapes.fit("qwen2.5-vl-7b", 1000)


def test_a_prior_of_attn_and_mlp_covers_the_projections_of_the_language_model() -> None:
    covered = [name for name, _ in shapes.named_shapes("qwen2.5-vl-7b") if shapes.covered(name, ["attn", "mlp"])]
    assert len(covered) == 28 * (4 + 3 + 3)  # weights of attention, its biases, and weights of the MLP
    assert not any("visual" in name for name in covered)


# What a step must move


@pytest.mark.parametrize(
    ("scaling", "states", "per_param"),
    [
        (None, torch.bfloat16, 14),
        ("absolute", torch.bfloat16, 16),
        ("absolute", torch.float32, 24),
        ("decoupled", torch.bfloat16, 16),
        ("gradnorm", torch.bfloat16, 18),
        ("adaptive_cosine", torch.float32, 28),
    ],
)
def test_bytes_to_move(scaling: str | None, states: torch.dtype, per_param: int) -> None:
    problem = Problem.random(SMALL, ["all"], torch.bfloat16, CPU)
    assert problem.bytes_to_move(scaling, states) == per_param * problem.numel


def test_tensors_without_a_delta_move_no_more_than_adamw_does() -> None:
    problem = Problem.random(SMALL, ["attn"], torch.bfloat16, CPU)
    biased = 63 * 17 + 63
    assert problem.bytes_to_move("absolute", torch.bfloat16) == 14 * problem.numel + 2 * biased


# Rivals


def biased_by_the_paper(grad: Tensor, delta: Tensor, scaling: str) -> Tensor:
    """The biased gradient as arXiv 2510.15050 has it, in float64."""
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


@pytest.mark.parametrize(
    ("rival", "scaling"), [(rival, scaling) for rival, scalings in peers.SCALINGS.items() for scaling in scalings]
)
def test_a_rival_does_the_same_work_as_ours(rival: str, scaling: str) -> None:
    problem = problem_at_zero()
    theirs = peers.WITH_PRIOR[rival](problem, scaling)
    ours = contender.drift(problem, BACKEND, scaling, torch.float32)
    for _ in range(3):
        for one in (theirs, ours):
            one.prepare()
            one.step()
    for own, other in zip(parameters(ours), parameters(theirs), strict=True):
        mine, expected = ours.optimizer.state[own], theirs.optimizer.state[other]
        pairs = [(mine[key], expected[key]) for key in ("exp_avg", "exp_avg_sq")]
        if (
            scaling == "decoupled"
        ):  # elsewhere exp_avg holds the bias, and a biased gradient near zero magnifies rounding
            pairs.append((own, other))
        for a, b in pairs:
            assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def test_contenders_share_gradients_but_not_parameters() -> None:
    problem = problem_at_zero()
    grads = [grad.clone() for grad in problem.grads]
    contenders = step.make_contenders(problem, None, [BACKEND], list(step.SCALINGS), [torch.float32])
    first_params = [parameters(one)[0].data_ptr() for one in contenders]
    assert len(set(first_params)) == len(contenders)
    measure.measure(contenders, CPU, reps=2)
    assert all(map(torch.equal, problem.grads, grads))
    assert not any(map(torch.equal, problem.scratch_grads[:3], grads[:3]))
    problem.restore_scratch_grads()
    assert all(map(torch.equal, problem.scratch_grads, grads))


def parameters(one: contender.Contender) -> list[Tensor]:
    assert one.optimizer is not None
    return one.optimizer.param_groups[0]["params"]


# Measuring


def test_every_contender_runs_once_in_each_repetition() -> None:
    calls: list[str] = []

    def recorder(name: str) -> contender.Contender:
        return contender.Contender(
            name, name, None, None, 0, step=lambda: calls.append(name), prepare=lambda: calls.append("prepare")
        )

    contenders = [recorder(name) for name in "abc"]
    timings = measure.measure(contenders, CPU, reps=4, warmup=1)
    assert calls[::2] == ["prepare"] * 15
    steps = calls[1::2]
    assert all(sorted(steps[i : i + 3]) == ["a", "b", "c"] for i in range(0, 15, 3))
    assert [len(times) for times in timings] == [4, 4, 4]


@pytest.mark.parametrize(("text", "count"), [("64M", 64_000_000), ("1.5b", 1_500_000_000), ("300k", 300_000), ("7", 7)])
def test_counts(text: str, count: int) -> None:
    assert step.parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "-1", "0", "infM", "64 million"])
def test_bad_counts_are_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        step.main(["--params", text])


# End to end

ROW_KEYS = {
    *("benchmark", "contender", "label", "ours", "scaling", "states", "ms", "min_ms", "host_ms"),
    *("bytes", "bytes_per_param", "gb_per_s", "percent_of_copy"),
    *("ratio_to_fused", "ratio_to_foreach_bias", "ratio_to_hook"),
    *("model", "scale", "modules", "tensors", "params", "biased_params", "dtype", "device_type", "threads", "reps"),
    *("device", "cores", "load", "python", "torch", "triton", "commit", "dirty", "date"),
}


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png")]
    size = ["--model", "qwen2.5-0.5b", "--params", "100k", "--reps", "2"]
    wanted = ["--scaling", "none", "gradnorm", "--contenders", "foreach_bias", "hook", BACKEND]
    assert step.main([*size, *wanted, *output]) == 0

    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(set(row) == ROW_KEYS for row in rows)
    assert [(row["contender"], row["scaling"], row["states"]) for row in rows] == [
        ("copy", "none", None),
        ("fused", "none", "bfloat16"),
        (BACKEND, "none", "bfloat16"),
        (BACKEND, "none", "float32"),
        ("foreach_bias", "gradnorm", "bfloat16"),
        ("hook", "gradnorm", "bfloat16"),
        (BACKEND, "gradnorm", "bfloat16"),
        (BACKEND, "gradnorm", "float32"),
    ]
    for row in rows:
        assert row["ms"]["low"] <= row["ms"]["median"] <= row["ms"]["high"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"]["median"] / 1e6)
        assert row["tensors"] == 290
    by_name = {(row["contender"], row["scaling"], row["states"]): row for row in rows}
    ours, rival = by_name[BACKEND, "gradnorm", "bfloat16"], by_name["hook", "gradnorm", "bfloat16"]
    assert by_name["fused", "none", "bfloat16"]["ratio_to_fused"]["median"] == 1
    assert by_name["copy", "none", None]["percent_of_copy"] == pytest.approx(100)
    assert ours["ratio_to_hook"]["median"] == pytest.approx(ours["ms"]["median"] / rival["ms"]["median"])
    assert rival["ratio_to_hook"] is None
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "prior, gradnorm" in table
    assert "authors' hook + torch fused" in table


def test_the_tiny_list_measures_the_cost_per_tensor(tmp_path: Path) -> None:
    rows_path = tmp_path / "rows.json"
    arguments = ["--shapes", "tiny", "--reps", "2", "--scaling", "absolute", "--contenders", BACKEND]
    assert step.main([*arguments, "--json", str(rows_path)]) == 0
    rows = json.loads(rows_path.read_text())
    assert {(row["tensors"], row["params"], row["gb_per_s"]) for row in rows} == {(729, 729 * 8, None)}


# No numbers while parity is red


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_parity_is_green(states: torch.dtype) -> None:
    check_parity(BACKEND, CPU, torch.bfloat16, states)


def wrong_bit(plan, coefficients, *, with_delta) -> None:
    backends.load("reference").update(plan, coefficients, with_delta=with_delta)
    plan.exp_avgs[-1].view(-1)[-1].mul_(1 + 2**-7)


def wrong_sum(plan, out, *, with_delta) -> None:
    backends.load("reference").grad_stats(plan, out, with_delta=with_delta)
    out *= 1 + 1e-4


@pytest.mark.parametrize(("primitive", "wrong"), [("update", wrong_bit), ("grad_stats", wrong_sum)])
def test_nothing_is_reported_while_parity_is_red(
    primitive: str, wrong, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = backends.load("cpu")
    monkeypatch.setattr(backend, "unavailable", lambda device: None)
    monkeypatch.setattr(backend, primitive, wrong)
    other = {"update": "grad_stats", "grad_stats": "update"}[primitive]
    monkeypatch.setattr(backend, other, getattr(backends.load("reference"), other))
    with pytest.raises(ParityError, match=r"backend 'cpu'.*differs"):
        check_parity("cpu", CPU, torch.float32, torch.float32)

    rows_path = tmp_path / "rows.json"
    assert step.main(["--model", "tiny", "--json", str(rows_path)]) == 1
    captured = capsys.readouterr()
    assert "Nothing was measured" in captured.err
    assert not captured.out
    assert not rows_path.exists()
