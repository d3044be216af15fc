"""Experts stored fused and transposed in the base and one by one in the expert, as in Qwen3-VL-MoE and Qwen3-MoE."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from checkpoints import TEXT, TRANSFORMERS_5, randomised
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drift_kernels import Prior, PriorError, build_prior
from drift_kernels.engine.binding import PriorBinding
from drift_kernels.prior import views
from drift_kernels.prior.checkpoint import Checkpoint
from drift_kernels.prior.files import Source
from drift_kernels.prior.unfusing import unfuse

HIDDEN, EXPERTS = TEXT["hidden_size"], 4
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
VISION_3 = {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32, "intermediate_size": 48}
VISION_3 |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
FUSED = "model.language_model.layers.{}.mlp.experts.{}"
SINGLE = "model.layers.{}.mlp.experts.{}.{}.weight"
ROPE_KEY = "rope_parameters" if TRANSFORMERS_5 else "rope_scaling"
fused_by_transformers = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="transformers 4 holds these experts transposed in memory"
)


def text_config(inter: int) -> dict[str, object]:
    return {**TEXT, "num_experts_per_tok": 2, "moe_intermediate_size": inter, "num_experts": EXPERTS}


def save_base(folder: Path, inter: int, transposed: bool = True) -> None:
    """Write the file transposed, as in the published checkpoint, or as transformers 5 saves it."""
    config = hf.Qwen3VLMoeConfig(
        text_config={**text_config(inter), ROPE_KEY: MROPE}, vision_config=VISION_3, tie_word_embeddings=False
    )
    randomised(hf.Qwen3VLMoeForConditionalGeneration(config)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(TEXT["num_hidden_layers"]):
        for fused, rows, columns in (("gate_up_proj", 2 * inter, HIDDEN), ("down_proj", HIDDEN, inter)):
            shape = (columns, rows) if transposed else (rows, columns)
            tensors[FUSED.format(layer, fused)] = torch.randn(EXPERTS, *shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def save_expert(folder: Path, inter: int, experts: int = EXPERTS) -> dict[str, Tensor]:
    randomised(hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**text_config(inter)))).save_pretrained(folder)
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".experts." not in n}
    for layer in range(TEXT["num_hidden_layers"]):
        for expert in range(experts):
            for leaf, shape in (("gate_proj", (inter, HIDDEN)), ("up_proj", (inter, HIDDEN))):
                tensors[SINGLE.format(layer, expert, leaf)] = torch.randn(shape)
            tensors[SINGLE.format(layer, expert, "down_proj")] = torch.randn(HIDDEN, inter)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def joined(expert: dict[str, Tensor], layer: int, leaves: tuple[str, ...]) -> Tensor:
    return torch.stack([torch.cat([expert[SINGLE.format(layer, e, leaf)] for leaf in leaves]) for e in range(EXPERTS)])


def bound(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    binding, named = PriorBinding(Prior.open(folder)), list(model.named_parameters())
    binding.check(named)
    found = binding.bind([(name, param, None) for name, param in named])
    return {name: delta.delta for (name, _), delta in zip(named, found, strict=True) if delta is not None}


@fused_by_transformers
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("inter", [8, 24, 40])
def test_every_element_is_expert_minus_base(inter: int, transposed: bool, tmp_path: Path) -> None:
    save_base(tmp_path / "base", inter, transposed)
    expert = save_expert(tmp_path / "expert", inter)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=torch.float32)
    assert prior.verify().intact
    model = hf.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    deltas, live = bound(tmp_path / "prior", model), dict(model.named_parameters())
    for layer in range(TEXT["num_hidden_layers"]):
        for fused, leaves in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            name = FUSED.format(layer, fused)
            assert torch.equal(deltas.pop(name), joined(expert, layer, leaves) - live[name].detach()), name
    for name, delta in deltas.items():
        source = expert[name.replace("model.language_model.", "model.")]
        assert torch.equal(delta, source - live[name].detach()), name
    assert not any("no counterpart" in warning for warning in prior.record["warnings"])


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("inter", "square"), [(HIDDEN // 2, "gate_up_proj"), (HIDDEN, "down_proj")])
def test_square_matrices_are_not_guessed(inter: int, square: str, transposed: bool, tmp_path: Path) -> None:
    save_base(tmp_path / "base", inter, transposed)
    save_expert(tmp_path / "expert", inter)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    assert not any(".experts." in name for name in prior.names)
    assert any("they are not paired" in w and f"experts.{square}" in w for w in prior.record["warnings"])


def test_a_family_whose_layout_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    save_base(tmp_path / "base", 24)
    save_expert(tmp_path / "expert", 24)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "model_type": "novel"}))
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    assert not any(".experts." in name for name in prior.names)
    assert any("they are not paired" in warning for warning in prior.record["warnings"])


def test_one_tensor_of_the_other_orientation_and_none_is_paired(tmp_path: Path) -> None:
    save_base(tmp_path / "base", 24)
    save_expert(tmp_path / "expert", 24)
    tensors = load_file(tmp_path / "base/model.safetensors")
    name = FUSED.format(1, "gate_up_proj")
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    assert not any(".experts." in name for name in prior.names)
    assert any("they are not paired" in warning for warning in prior.record["warnings"])


@pytest.mark.parametrize("experts", [EXPERTS - 1, EXPERTS + 1])
def test_another_number_of_experts_than_are_fused(experts: int, tmp_path: Path) -> None:
    save_base(tmp_path / "base", 24)
    save_expert(tmp_path / "expert", 24, experts)
    with pytest.raises(PriorError, match=r"experts.*use --modules attn"):
        build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    assert len(build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", modules=["attn"]))


@pytest.mark.parametrize("experts", [EXPERTS - 1, EXPERTS + 1])
def test_another_number_of_single_experts(experts: int, tmp_path: Path) -> None:
    save_expert(tmp_path / "base", 24)
    save_expert(tmp_path / "expert", 24, experts)
    with pytest.raises(PriorError, match=rf"{experts} in the expert.*not the same expert; use --modules attn"):
        build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")


@pytest.mark.parametrize("band", [1, 10, 1 << 16])
def test_any_run_of_elements_is_read(band: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "_BAND", band)
    config = {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 5, "moe_intermediate_size": 4}}
    fused = torch.randn(3, 5, 8, dtype=torch.bfloat16)
    names = {leaf: f"layers.0.mlp.experts.2.{leaf}.weight" for leaf in ("gate_proj", "up_proj")}
    save_file({"layers.0.mlp.experts.gate_up_proj": fused}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with Checkpoint(tmp_path) as checkpoint:
        tensors: dict[str, Source] = unfuse(checkpoint, checkpoint.tensors, names.values())
        assert len(tensors) == 6
        for name, expected in zip(names.values(), fused[2].T.contiguous().chunk(2), strict=True):
            assert torch.equal(checkpoint.read(tensors[name]), expected)
            for begin in range(20):
                for end in range(begin + 1, 21):
                    flat = torch.empty(end - begin, dtype=torch.bfloat16)
                    checkpoint.read_into(flat, tensors[name], begin)
                    assert torch.equal(flat, expected.reshape(-1)[begin:end])


def test_a_stack_that_has_no_equal_halves_stays_as_it_is(tmp_path: Path) -> None:
    save_file({"layers.0.mlp.experts.gate_up_proj": torch.randn(3, 5, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_ocr2_text"}))
    with Checkpoint(tmp_path) as checkpoint:
        wanted = [f"layers.0.mlp.experts.0.{leaf}_proj.weight" for leaf in ("gate", "up")]
        assert unfuse(checkpoint, checkpoint.tensors, wanted) == checkpoint.tensors


@pytest.mark.parametrize("family", ["deepseek_ocr2_text", "minimax_m3_vl_text"])
def test_families_that_never_transpose_have_square_matrices_too(family: str, tmp_path: Path) -> None:
    stacks = {"gate_up_proj": torch.randn(3, 8, 8), "down_proj": torch.randn(3, 8, 4)}
    save_file({f"layers.0.mlp.experts.{leaf}": t for leaf, t in stacks.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with Checkpoint(tmp_path) as checkpoint:
        wanted = [f"layers.0.block_sparse_moe.experts.0.{leaf}.weight" for leaf in ("w1", "w2", "w3")]
        tensors = unfuse(checkpoint, checkpoint.tensors, wanted)
        assert len(tensors) == 9
        for expert in range(3):
            w1, w2, w3 = (checkpoint.read(tensors[name.replace(".0.w", f".{expert}.w")]) for name in wanted)
            assert torch.equal(torch.cat([w1, w3]), stacks["gate_up_proj"][expert])
            assert torch.equal(w2, stacks["down_proj"][expert])
