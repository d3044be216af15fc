"""Names: every projection of a language model is found, whoever stored or wrapped it; nothing of a vision tower is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from checkpoints import CROSS_LAYERS, FAMILIES, TEXT, randomised
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from drift_kernels import Prior, build_prior
from drift_kernels.prior.names import canonical_name, layer_of, module_of, parse_layers, select_names

PROJECTION = re.compile(r"layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.(?:weight|bias)")

Q_PROJ = "layers.3.self_attn.q_proj.weight"
STORED_PREFIXES = [
    "model.",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "model.text_model.",
    "thinker.model.",
    "thinker.model.language_model.",
    "llm.model.",
    "language.model.",
    "text_model.model.",
    "model.language_model.model.",
    "language_model.model.model.",
    "language_model.model.encoder.",
    "gpt_neox.",
    "backbone.",
    "language_model.backbone.",
    "model.vlm.language_model.",
    "paligemma_with_expert.paligemma.model.language_model.",
]
WRAPPED = [
    "module.model.layers.3.self_attn.q_proj.weight",
    "_orig_mod.model.language_model.layers.3.self_attn.q_proj.weight",
    "module._orig_mod.model.layers.3._orig_mod.self_attn.q_proj.weight",
    "_fsdp_wrapped_module.model.layers.3._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.q_proj.weight",
    "base_model.model.model.layers.3.self_attn.q_proj.weight",
    "module.base_model.model.model.language_model.layers.3.self_attn.q_proj.weight",
]
NOT_OF_THE_LANGUAGE_MODEL = [
    "visual.blocks.3.attn.qkv.weight",
    "model.visual.blocks.3.mlp.gate_proj.weight",
    "vision_tower.vision_model.encoder.layers.3.self_attn.q_proj.weight",
    "model.vision_tower.encoder.layers.3.self_attn.q_proj.weight",
    "vision_tower.transformer.layers.3.attention.q_proj.weight",
    "vision_model.encoder.layers.3.self_attn.q_proj.weight",
    "model.vision_model.transformer.layers.3.self_attn.q_proj.weight",
    "text_model.encoder.layers.3.self_attn.q_proj.weight",
    "audio_tower.layers.3.self_attn.q_proj.weight",
    "talker.model.layers.3.self_attn.q_proj.weight",
    "mtp.layers.0.self_attn.q_proj.weight",
    "model.multi_modal_projector.linear_1.weight",
    "model.connector.perceiver_resampler.layers.1.self_attn.q_proj.weight",
    "model.embed_vision.norm.weight",
]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    hf.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("prefix", STORED_PREFIXES)
def test_every_known_prefix_leads_to_the_canonical_name(prefix: str) -> None:
    for name in (Q_PROJ, "embed_tokens.weight", "norm.weight"):
        assert canonical_name(prefix + name) == name


@pytest.mark.parametrize("prefix", ["", "language_model.", "thinker.", "llm.", "language."])
def test_every_place_of_the_head(prefix: str) -> None:
    assert canonical_name(f"{prefix}lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_fall_away_wherever_they_stand(name: str) -> None:
    assert canonical_name(name) == Q_PROJ


@pytest.mark.parametrize("name", NOT_OF_THE_LANGUAGE_MODEL)
def test_other_names_stand_for_themselves(name: str) -> None:
    assert canonical_name(name) == name
    assert canonical_name(f"module.{name}") == name
    assert module_of(name) == "other"


def test_kimi_as_transformers_5_saves_it() -> None:
    assert canonical_name("language_model.model.blocks.3.self_attn.q_proj.weight") == Q_PROJ


def test_canonical_names_are_fixed_points() -> None:
    for name in (Q_PROJ, "embed_tokens.weight", "norm.weight", "lm_head.weight"):
        assert canonical_name(name) == name


def test_a_name_map_comes_before_the_table_and_its_longest_prefix_first() -> None:
    rules = {"transformer.": "", "transformer.h.": "layers."}
    assert canonical_name("module.transformer.h.3.self_attn.q_proj.weight", rules) == Q_PROJ
    assert canonical_name("transformer.norm.weight", rules) == "norm.weight"
    assert canonical_name("model.layers.3.self_attn.q_proj.weight", rules) == Q_PROJ


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("layers.0.self_attn.q_proj.bias", "attn"),
        ("layers.0.self_attn.qkv_proj.weight", "attn"),
        ("layers.0.linear_attn.in_proj_qkvz.weight", "attn"),
        ("layers.0.cross_attn.o_proj.weight", "attn"),
        ("layers.0.self_attn.q_norm.weight", "norm"),
        ("layers.0.post_attention_layernorm.weight", "norm"),
        ("norm.weight", "norm"),
        ("layers.0.mlp.gate_up_proj.weight", "mlp"),
        ("layers.0.mlp.experts.7.down_proj.weight", "mlp"),
        ("layers.0.mlp.experts.gate_up_proj", "mlp"),
        ("layers.0.block_sparse_moe.experts.1.w2.weight", "mlp"),
        ("layers.0.mlp.gate.weight", "other"),
        ("layers.0.experts.gate_up_proj", "mlp"),  # Gemma 4
        ("layers.0.router.proj.weight", "other"),
        ("layers.0.mlp.experts.fc1.weight", "mlp"),  # Aria
        ("layers.0.block_sparse_moe.input_linear.weight", "mlp"),  # Granite
        ("layers.0.block_sparse_moe.router.layer.weight", "other"),
        ("layers.0.shared_mlp.output_linear.weight", "mlp"),
        ("layers.0.mlp.fc2.bias", "mlp"),  # Phi-1, Phi-2
        ("layers.0.self_attn.dense.weight", "attn"),
        ("layers.0.mlp.c_fc.weight", "mlp"),  # Starcoder2
        ("layers.0.mlp.c_proj.weight", "mlp"),
        ("layers.0.conv.in_proj.weight", "attn"),  # LFM2
        ("layers.0.conv.conv.weight", "attn"),
        ("layers.0.feed_forward.w1.weight", "mlp"),
        ("layers.0.attention.query_key_value.weight", "attn"),  # GPT-NeoX
        ("layers.0.attention.dense.bias", "attn"),
        ("layers.0.mlp.dense_4h_to_h.weight", "mlp"),
        ("layers.0.self_attention.query_key_value.weight", "attn"),  # Falcon
        ("layers.0.attn.Wqkv.weight", "attn"),  # MPT
        ("layers.0.ffn.up_proj.weight", "mlp"),
        ("layers.0.mamba.in_proj.weight", "attn"),
        ("layers.0.mamba.conv1d.bias", "attn"),
        ("layers.0.mixer.out_proj.weight", "attn"),
        ("layers.0.mixer.q_proj.weight", "attn"),  # Nemotron-H, as the next two
        ("layers.0.mixer.up_proj.weight", "mlp"),
        ("layers.0.mixer.experts.3.down_proj.weight", "mlp"),
        ("layers.0.mixer.gate.weight", "other"),
        ("layers.0.linear_attn.conv1d.weight", "attn"),
        ("layers.0.linear_attn.norm.weight", "norm"),
        ("layers.0.self_attn.kv_a_proj_with_mqa.weight", "attn"),
        ("layers.0.mlp.shared_expert_gate.weight", "other"),
        ("layers.0.mlp.shared_expert.up_proj.weight", "mlp"),
        ("layers.0.mlp.gate.e_score_correction_bias", "other"),
        ("layers.0.per_layer_projection.weight", "other"),
        ("embed_tokens.weight", "embed"),
        ("lm_head.weight", "head"),
    ],
)
def test_modules(name: str, module: str) -> None:
    assert module_of(name) == module


def test_selection_by_module_layer_and_regular_expression() -> None:
    names = [f"layers.{n}.{part}" for n in (10, 2, 0) for part in ("self_attn.q_proj.weight", "mlp.gate.weight")]
    names.append("embed_tokens.weight")
    q_proj = "self_attn.q_proj.weight"
    assert select_names(names, ["attn"]) == [f"layers.{n}.{q_proj}" for n in (0, 2, 10)]
    assert select_names(names, ["attn", "embed"], [2]) == ["embed_tokens.weight", f"layers.2.{q_proj}"]
    assert select_names(names, [r"re:mlp\.gate\."], [0, 10]) == [
        "layers.0.mlp.gate.weight",
        "layers.10.mlp.gate.weight",
    ]
    assert parse_layers("0-3, 8") == {0, 1, 2, 3, 8}
    for wrong in ("", "3-1", "a", "1-", "-1"):
        with pytest.raises(ValueError, match="layers must be numbers and ranges"):
            parse_layers(wrong)
    with pytest.raises(ValueError, match=r"modules must be any of .* got 'attention'"):
        select_names(names, ["attention"])
    with pytest.raises(ValueError, match="not a valid regular expression"):
        select_names(names, ["re:("])


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    """A prior of real checkpoints binds to the reloaded model: all projections, no vision tower, the right values."""
    base, expert = FAMILIES[family].base(), FAMILIES[family].expert()
    base.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    expert.save_pretrained(tmp_path / "expert")
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=torch.float32)
    live = type(base).from_pretrained(tmp_path / "base", dtype=torch.float32)

    coverage = prior.match(live.named_parameters(), strict=True)

    layers = [n for n in range(5) if n not in CROSS_LAYERS] if family == "mllama" else [0, 1, 2]
    weights, trained = dict(live.named_parameters()), dict(expert.named_parameters())
    projections = [name for name in trained if PROJECTION.search(name)]
    assert len(coverage.matched) == len(projections) >= 7 * TEXT["num_hidden_layers"]
    for live_name, name in coverage.matched.items():
        assert not re.search(r"vis|image|audio|projector|connector", live_name)
        text_layer = layers.index(layer_of(name))
        text_name = re.sub(r"layers\.\d+", f"model.layers.{text_layer}", name)
        torch.testing.assert_close(prior.load(name), trained[text_name] - weights[live_name], rtol=0, atol=0)
    unmatched = [name for name in coverage.model_only if PROJECTION.search(name)]
    assert all(
        re.search(r"vision|visual|perceiver", name) or layer_of(canonical_name(name)) in CROSS_LAYERS
        for name in unmatched
    )


def test_wrapped_live_models_bind(tmp_path: Path) -> None:
    model = FAMILIES["qwen2_5_vl"].base()
    projections = {n: p.detach() for n, p in model.named_parameters() if "language_model.layers" in n and "_proj" in n}
    prior = Prior.from_mapping(projections)
    language_model = model.model.language_model
    for number, layer in enumerate(language_model.layers):
        language_model.layers[number] = checkpoint_wrapper(layer)
    wrapper = nn.Module()
    wrapper.module = torch.compile(model)
    names = [name for name, _ in wrapper.named_parameters()]
    assert any("_checkpoint_wrapped_module" in name and "_orig_mod" in name for name in names)
    assert len(prior.match(wrapper.named_parameters(), strict=True).matched) == len(projections)


def test_experts_that_the_model_fuses_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = hf.Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    base, expert = (randomised(hf.Qwen3MoeForCausalLM(config)) for _ in range(2))
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    caplog.set_level("INFO", "drift_kernels")
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    assert any("experts are stored one by one" in warning for warning in prior.record["warnings"])
    caplog.clear()
    coverage = prior.match(base.named_parameters())
    assert coverage.complete
    assert not caplog.records
    assert sum("self_attn" in name for name in coverage.matched) == 4 * TEXT["num_hidden_layers"]
    if any(name.endswith("experts.gate_up_proj") for name, _ in base.named_parameters()):
        assert "this model holds its experts fused" in coverage.summary()
