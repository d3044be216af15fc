"""Tensors left out of a prior are reported, and a language model unknown to the name table is found by shape."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import transformers as hf
from checkpoints import TEXT, TRANSFORMERS_5, randomised, text_weights, tuned, write_checkpoint
from torch import Tensor, nn

from drift_kernels import FusedDriftAdamW, Prior, PriorError, PriorMismatchError, build_prior
from drift_kernels.cli import main
from drift_kernels.integrations import step_figures
from drift_kernels.prior.build import open_checkpoint
from drift_kernels.prior.in_memory import live_parameters


def tower(prefix: str, width: int, layers: int = 3) -> dict[str, Tensor]:
    """A tower with the same names, which could be mistaken for a language model."""
    return {
        f"{prefix}{n}.self_attn.{p}_proj.weight": torch.randn((33, width) if p != "o" else (width, 33))
        for n in range(layers)
        for p in "qkvo"
    } | {f"{prefix}{n}.mlp.{p}_proj.weight": torch.randn(63, width) for n in range(layers) for p in ("gate", "up")}


def build(folder: Path, base: dict[str, Tensor], expert: dict[str, Tensor] | None = None, **options: object) -> Prior:
    write_checkpoint(folder / "base", base)
    write_checkpoint(folder / "expert", text_weights() if expert is None else expert)
    return build_prior(folder / "expert", folder / "base", folder / "prior", dtype=torch.float32, **options)


def live(weights: dict[str, Tensor], old: str, new: str) -> list[tuple[str, Tensor]]:
    return [(name.replace(old, new, 1), nn.Parameter(tensor)) for name, tensor in weights.items()]


@pytest.mark.parametrize(("prefix", "rule"), [("novel.text.layers.", "novel.text.="), ("novel.h.", "novel.h.=layers.")])
def test_an_unknown_prefix_is_aligned_recorded_and_logged(
    prefix: str, rule: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = {name.replace("model.layers.", prefix, 1): t for name, t in text_weights().items()}
    base |= tower("novel.vision.layers.", 40)
    expert = text_weights()
    prior = build(tmp_path, base, expert)
    assert len(prior) == 3 * 8
    key = "layers.1.mlp.up_proj.weight"
    assert torch.equal(prior.load(key), expert[f"model.{key}"] - base[f"{prefix}1.mlp.up_proj.weight"])
    assert prior.record["name_map"] == dict([rule.split("=")])
    assert any(f"--name-map {rule})" in warning for warning in prior.record["warnings"])
    assert f"--name-map {rule})" in caplog.text
    # The same names in memory, wrapped; and names that are not in the record either.
    assert len(prior.match(live(base, "novel", "module.novel"), strict=True).matched) == len(prior)
    caplog.set_level(logging.INFO, "drift_kernels")
    assert len(prior.match(live(base, "novel.", "model.other."), strict=True).matched) == len(prior)
    assert "the names of this model are not known" in caplog.text


def test_an_aligned_model_is_said_once_and_its_figures_are_of_their_modules(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = text_weights()
    prior = build(tmp_path, base)
    caplog.set_level(logging.INFO, "drift_kernels")
    named = live(base, "model.", "novel.text.")
    optimizer = FusedDriftAdamW(named, prior=prior, prior_scaling="gradnorm")
    for _, param in named:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert caplog.text.count("the names of this model are not known") == 1
    assert set(optimizer.prior_modules) == {"attn", "mlp"}
    of_modules = {figure for figure in step_figures(optimizer, "") if "/" in figure}
    assert of_modules == {f"{f}/{m}" for f in ("cosine", "ratio") for m in ("attn", "mlp")}


def test_an_expert_of_unknown_names_is_aligned(tmp_path: Path) -> None:
    expert = {name.replace("model.layers.", "transformer.h.", 1): t for name, t in text_weights().items()}
    base = text_weights(prefix="language_model.model.")
    assert build(tmp_path, base, expert).record["name_map"] == {"transformer.h.": "layers."}


def test_two_alignments_are_refused_with_the_lines_that_would_do(tmp_path: Path) -> None:
    base = {name.replace("model.layers.", "novel.a.layers.", 1): t for name, t in text_weights().items()}
    base |= {name.replace("novel.a.", "novel.b."): t.clone() for name, t in base.items()}
    with pytest.raises(PriorError, match=r"more than one place: .*--name-map novel\.a\.= or --name-map novel\.b\.="):
        build(tmp_path, base)
    prior = build_prior(
        tmp_path / "expert", tmp_path / "base", tmp_path / "prior", name_map={"novel.b.": ""}, dtype=torch.float32
    )
    with pytest.raises(PriorMismatchError, match=r"more than one place"):
        prior.match(live(base, "novel", "other"))


def test_no_alignment_is_an_error_that_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(
        PriorError,
        match=r"no layers with known names in .*base, and those under novel\.vision\.layers\. have different",
    ):
        build(tmp_path, tower("novel.vision.layers.", 40))


def test_a_list_that_has_half_of_the_matrices_does_not_fit_and_one_that_has_more_does(tmp_path: Path) -> None:
    expert = tower("model.layers.", 31)
    base = [(name.replace("model.", "novel."), torch.randn_like(tensor)) for name, tensor in expert.items()]
    half = len(base) // 2
    with pytest.raises(PriorError, match=r"those under novel\.layers\. have different names or shapes"):
        build(tmp_path / "half", dict(base[:half]), expert)
    assert len(build(tmp_path / "more", dict(base[: half + 1]), expert)) == half + 1


def test_checkpoints_without_matrices_or_layers_need_no_alignment(tmp_path: Path) -> None:
    vectors = {"model.layers.0.input_layernorm.weight": torch.randn(4), "model.embed_tokens.weight": torch.randn(4, 4)}
    assert len(build(tmp_path / "vectors", vectors, tuned(vectors), modules=("norm", "embed"))) == 2
    vectors.pop("model.layers.0.input_layernorm.weight")
    assert len(build(tmp_path / "bare", vectors, tuned(vectors), modules=("embed",))) == 1


def test_matrices_that_no_module_claims_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {f"model.layers.{n}.{part}.weight": torch.randn(4, 4) for n in (0, 1) for part in ("novel", "mlp.gate")}
    extra |= {
        "model.layers.0.novel.bias": torch.randn(4),
        "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1),
    }
    weights = text_weights() | extra
    warnings = build(tmp_path, weights, tuned(weights)).record["warnings"]
    expected = "2 matrices in the layers belong to no module and are left out: layers.0.novel.weight, "
    expected += "layers.1.novel.weight; add re:REGEX to the modules to include them"
    assert warnings == [expected]
    assert expected in caplog.text
    folders = tmp_path / "expert", tmp_path / "base"
    chosen = build_prior(*folders, tmp_path / "chosen", modules=("attn", "mlp", r"re:novel"))
    assert "layers.1.novel.weight" in chosen.names
    assert chosen.record["warnings"] == []
    other_layers = build_prior(*folders, tmp_path / "layers", layers=[2])
    assert other_layers.record["warnings"] == []


def test_a_module_of_which_there_is_nothing_is_named(tmp_path: Path) -> None:
    weights = {name: tensor for name, tensor in text_weights().items() if "mlp" not in name}
    assert build(tmp_path, weights, tuned(weights)).record["warnings"] == [
        "no mlp tensor with a known name is in all checkpoints"
    ]


def test_a_tied_head_is_named_once(tmp_path: Path) -> None:
    weights = text_weights()
    assert build(tmp_path, weights, tuned(weights), modules=("attn", "head")).record["warnings"] == [
        "the base's head is tied to its embedding: there is no separate head to make a delta for"
    ]


@pytest.mark.parametrize("leaf", ["down_proj", "up_proj"])  # Nemotron-H has no gate
def test_experts_of_two_forms_are_not_paired_and_it_says_so(tmp_path: Path, leaf: str) -> None:
    single = {f"model.layers.0.mlp.experts.{e}.{leaf}.weight": torch.randn(4, 4) for e in range(2)}
    fused = {f"model.layers.0.mlp.experts.{leaf}": torch.randn(2, 4, 4)}
    warnings = build(tmp_path, text_weights() | fused, text_weights() | single).record["warnings"]
    assert any("one by one in the expert and fused in the base: they are not paired" in w for w in warnings)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="experts are fused by transformers 5")
def test_check_answers_for_the_model_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = hf.Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    for role in ("base", "expert"):
        randomised(hf.Qwen3MoeForCausalLM(config)).save_pretrained(tmp_path / role)
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    assert main(["check", str(tmp_path / "prior"), "--model", str(tmp_path / "base")]) == 0
    out = capsys.readouterr().out
    assert "48 of 48 deltas are bound to parameters" in out
    assert "36 deltas are joined in 6 parameters: this model holds its experts fused" in out
    assert f"by the names of Qwen3MoeForCausalLM in memory (transformers {hf.__version__})" in out


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "config.json has no architecture"),
        ({"architectures": ["NovelForCausalLM"]}, "has no NovelForCausalLM"),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": "x"},
            "cannot be created from config",
        ),
    ],
)
def test_where_the_model_is_not_known_check_answers_for_the_disk(
    config: dict[str, object], reason: str, tmp_path: Path
) -> None:
    weights = text_weights()
    with open_checkpoint(write_checkpoint(tmp_path / "model", weights, config=config)) as checkpoint:
        parameters, whose = live_parameters(checkpoint)
    assert {name: tuple(p.shape) for name, p in parameters} == {name: tuple(t.shape) for name, t in weights.items()}
    assert whose.startswith("by the names on disk, because ")
    assert reason in whose


def test_without_transformers_check_answers_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = write_checkpoint(tmp_path / "model", text_weights(), config={"architectures": ["LlamaForCausalLM"]})
    with open_checkpoint(folder) as checkpoint:
        assert "because transformers is not installed" in live_parameters(checkpoint)[1]
