"""The step benchmark: its parameter lists, its timing, its check before measuring, and small runs end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import rows
from benchmarks.step import command, lineup, shapes
from benchmarks.step.modes import Mode, Storage
from benchmarks.step.parity import ParityError, check_parity
from benchmarks.step.problem import Problem
from drift_kernels.kernels import backends

CPU = torch.device("cpu")
BACKEND = "cpu" if backends.load("cpu").unavailable(CPU) is None else "reference"
SMALL = [
    ("model.layers.0.self_attn.q_proj.weight", (63, 17)),
    ("model.layers.0.self_attn.q_proj.bias", (63,)),
    ("model.layers.0.mlp.up_proj.weight", (1000, 3)),
    ("model.norm.weight", (17,)),
]

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


@pytest.mark.parametrize("model", shapes.MODELS)
def test_the_first_layers_keep_their_names_and_full_width(model: str) -> None:
    full, first = shapes.named_shapes(model), shapes.named_shapes(model, layers=3)
    later = re.compile(r"(layers|blocks)\.([3-9]|\d\d)\.")
    assert first == [(name, shape) for name, shape in full if not later.search(name)]
    assert len(first) < len(full)
    assert shapes.named_shapes(model, layers=1000) == full


def test_a_prior_of_attn_and_mlp_covers_the_projections_of_the_language_model() -> None:
    covered = [name for name, _ in shapes.named_shapes("qwen2.5-vl-7b") if shapes.covered(name, ["attn", "mlp"])]
    assert len(covered) == 28 * (4 + 3 + 3)  # weights of attention, its biases, and weights of the MLP
    assert not any("visual" in name for name in covered)


# What a step must move


@pytest.mark.parametrize(
    ("scaling", "state_bytes", "per_param", "with_clipping"),
    [
        (None, 4, 14, 16),
        (None, 2, 10, 12),
        ("absolute", 4, 16, 20),
        ("absolute", 8, 24, 28),
        ("decoupled", 4, 16, 18),
        ("gradnorm", 4, 18, 20),
        ("adaptive_cosine", 8, 28, 28),
    ],
)
def test_bytes_to_move(scaling: str | None, state_bytes: int, per_param: int, with_clipping: int) -> None:
    problem = Problem.random(SMALL, ["all"], torch.bfloat16, CPU)
    storage = Storage.plain(state_bytes, 2)
    assert problem.bytes_to_move(scaling, storage) == per_param * problem.numel
    assert problem.bytes_to_move(scaling, storage, clip=True) == with_clipping * problem.numel


def test_tensors_without_a_delta_move_no_more_than_adamw_does() -> None:
    problem = Problem.random(SMALL, ["attn"], torch.bfloat16, CPU)
    biased = 63 * 17 + 63
    storage = Storage.plain(4, 2)
    assert problem.bytes_to_move("absolute", storage) == 14 * problem.numel + 2 * biased
    assert problem.bytes_to_move("gradnorm", storage, clip=True) == 16 * problem.numel + 4 * biased


# Arguments


@pytest.mark.parametrize(("text", "count"), [("64M", 64_000_000), ("1.5b", 1_500_000_000), ("300k", 300_000), ("7", 7)])
def test_counts(text: str, count: int) -> None:
    assert command.parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "-1", "0", "infM", "64 million"])
def test_bad_counts_are_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        command.main(["--params", text])


# End to end

ROW_KEYS = {
    *("benchmark", "contender", "label", "ours", "scaling", "clip", "ms", "min_ms", "host_ms"),
    *("states", "rounding", "master", "prior_dtype", "prior_device"),
    *("bytes", "bytes_per_param", "state_bytes", "stored_bytes", "peak_extra_bytes", "gb_per_s", "percent_of_copy"),
    "percent_of_streams",
    *("ratio_to_fused", "ratio_to_foreach_bias", "ratio_to_hook"),
    *(
        "model",
        "scale",
        "layers",
        "modules",
        "tensors",
        "params",
        "biased_params",
        "dtype",
        "device_type",
        "threads",
        "reps",
    ),
    *("device", "cores", "load", "python", "torch", "triton", "commit", "dirty", "date"),
}


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plots = [tmp_path / "plot.png", tmp_path / "roofline.png"]
    output = ["--json", str(tmp_path / "rows.json"), "--plot", str(plots[0]), "--roofline", str(plots[1])]
    size = ["--model", "qwen2.5-0.5b", "--params", "100k", "--reps", "2"]
    wanted = ["--scaling", "none", "gradnorm", "--contenders", "foreach_bias", "hook", BACKEND]
    assert command.main([*size, *wanted, *output]) == 0

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
        assert row["peak_extra_bytes"] is None
    by_name = {(row["contender"], row["scaling"], row["states"]): row for row in rows}
    ours, rival = by_name[BACKEND, "gradnorm", "bfloat16"], by_name["hook", "gradnorm", "bfloat16"]
    assert by_name["fused", "none", "bfloat16"]["ratio_to_fused"]["median"] == 1
    assert by_name["copy", "none", None]["percent_of_copy"] == pytest.approx(100)
    assert ours["ratio_to_hook"]["median"] == pytest.approx(ours["ms"]["median"] / rival["ms"]["median"])
    assert rival["ratio_to_hook"] is None
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    table = capsys.readouterr().out
    assert "prior, gradnorm" in table
    assert "authors' hook + torch fused" in table


def test_the_tiny_list_measures_the_cost_per_tensor(tmp_path: Path) -> None:
    rows_path = tmp_path / "rows.json"
    arguments = ["--shapes", "tiny", "--reps", "2", "--scaling", "absolute", "--contenders", BACKEND]
    assert command.main([*arguments, "--json", str(rows_path)]) == 0
    rows = json.loads(rows_path.read_text())
    assert {(row["tensors"], row["params"], row["gb_per_s"]) for row in rows} == {(729, 729 * 8, None)}


def test_clipping_is_a_contest_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_path = tmp_path / "rows.json"
    size = ["--model", "qwen2.5-0.5b", "--params", "100k", "--reps", "2", "--scaling", "absolute"]
    wanted = ["--clip", "no", "yes", "--contenders", "foreach_bias", BACKEND, "--states", "float32"]
    assert command.main([*size, *wanted, "--json", str(rows_path)]) == 0
    rows = {(row["contender"], row["clip"]): row for row in json.loads(rows_path.read_text())}
    assert list(rows) == [
        *(("copy", False), ("fused", False), ("fused", True)),
        *(("foreach_bias", False), (BACKEND, False), ("foreach_bias", True), (BACKEND, True)),
    ]
    for clip in (False, True):
        ours = rows[BACKEND, clip]
        for rival in ("fused", "foreach_bias"):
            expected = ours["ms"]["median"] / rows[rival, clip]["ms"]["median"]
            assert ours[f"ratio_to_{rival}"]["median"] == pytest.approx(expected)
    assert rows[BACKEND, True]["bytes_per_param"] == rows[BACKEND, False]["bytes_per_param"] + 4
    assert "prior, absolute, clipping" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--layers", "1", "--params", "1M"], ["--layers", "0"], ["--model", "tiny", "--layers", "1"], ["--clip", "maybe"]],
)
def test_sizes_that_contradict_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)


def test_what_does_not_fit_is_refused_before_it_is_allocated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Problem, "random", lambda *_: pytest.fail("allocated"))
    monkeypatch.setattr(lineup, "free_bytes", lambda device: 10**9)
    with pytest.raises(SystemExit):
        command.main(["--layers", "28", "--scaling", "absolute", "--contenders", BACKEND, "--states", "float32"])
    # params, grads and deltas; fused with bfloat16, ours with float32 states; the copy of 4 GiB
    params = shapes.numel(shapes.named_shapes("qwen2.5-vl-7b", layers=28))
    needed = (params * (3 * 2 + 6 + 10) + 2**32) / 1e9 + 8 * 0.545  # and one norm in float64
    stated = float(re.search(r"need about ([\d.]+) GB, and cpu has 1.0 GB free", capsys.readouterr().err)[1])
    assert stated == pytest.approx(needed, rel=0.1 if BACKEND == "reference" else 0.001)


def test_a_copy_without_git_can_name_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_git", lambda *_: None)
    monkeypatch.delenv("DRIFT_KERNELS_COMMIT", raising=False)
    assert (rows.row_metadata()["commit"], rows.row_metadata()["dirty"]) == (None, True)
    monkeypatch.setenv("DRIFT_KERNELS_COMMIT", "d9819ec")
    assert (rows.row_metadata()["commit"], rows.row_metadata()["dirty"]) == ("d9819ec", True)


# No numbers while parity is red


def wrong_bit(plan, coefficients, *, with_delta) -> None:
    backends.load("reference").update(plan, coefficients, with_delta=with_delta)
    plan.operands[-1].exp_avg.view(-1)[-1].mul_(1 + 2**-7)


def wrong_sum(plan, out, *, with_delta) -> None:
    backends.load("reference").grad_stats(plan, out, with_delta=with_delta)
    out *= 1 + 1e-4


@pytest.mark.parametrize(("primitive", "wrong"), [("update", wrong_bit), ("grad_stats", wrong_sum)])
def test_nothing_is_reported_while_parity_is_red(
    primitive: str, wrong, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = backends.load("cpu")
    monkeypatch.setattr(backend, "unavailable", lambda device: None)
    monkeypatch.setattr(backend, "READS_TENSORS", True)  # as the reference, which it is made to be
    monkeypatch.setattr(backend, primitive, wrong)
    other = {"update": "grad_stats", "grad_stats": "update"}[primitive]
    monkeypatch.setattr(backend, other, getattr(backends.load("reference"), other))
    with pytest.raises(ParityError, match=r"backend 'cpu'.*differs"):
        check_parity("cpu", CPU, torch.float32, Mode(torch.float32))

    rows_path = tmp_path / "rows.json"
    assert command.main(["--model", "tiny", "--json", str(rows_path)]) == 1
    captured = capsys.readouterr()
    assert "Nothing was measured" in captured.err
    assert not captured.out
    assert not rows_path.exists()
