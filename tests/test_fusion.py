"""Deltas stored one by one, in models that transformers 5 loads into fused or renamed parameters: each live parameter's
bound delta is the difference of the two live models' parameters, element by element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from checkpoints import TEXT, TRANSFORMERS_5, VISION, flip_bit, randomised
from torch import Tensor, nn

from drift_kernels import Prior, PriorFormatError, PriorMismatchError, build_prior
from drift_kernels.engine.binding import BoundDelta, PriorBinding
from drift_kernels.prior import QuantizedDelta, quantize
from drift_kernels.prior.fusion import find_sources
from drift_kernels.prior.names import canonical_name, layer_of, module_of
from drift_kernels.prior.strengths import Strengths
from drift_kernels.sharding import Shard

pytestmark = pytest.mark.skipif(not TRANSFORMERS_5, reason="experts are fused by transformers 5")

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
QWEN_MOE = {**TEXT, **EXPERTS, "num_experts": 4}
DEEPSEEK = {**TEXT, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
DEEPSEEK |= {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK |= {"num_key_value_heads": 4}
VISION_3 = {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32, "intermediate_size": 48}
VISION_3 |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}


def qwen3_vl_moe() -> hf.PretrainedConfig:
    return hf.Qwen3VLMoeConfig(
        text_config={**QWEN_MOE, "rope_parameters": MROPE}, vision_config=VISION_3, tie_word_embeddings=False
    )


def aria() -> hf.PretrainedConfig:
    text = {**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    return hf.AriaConfig(
        text_config=text,
        vision_config={**VISION, "model_type": "idefics3_vision"},
        projector_patch_to_query_dict={4: 2},
    )


def glm4v_moe() -> hf.PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    text = {**TEXT, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32, "intermediate_size": 48}
    vision |= {"image_size": 28, "patch_size": 14}
    return hf.Glm4vMoeConfig(text_config={**text, "first_k_dense_replace": 1}, vision_config=vision)


def qwen3_5_moe() -> hf.PretrainedConfig:
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    text = {**QWEN_MOE, **linear, "shared_expert_intermediate_size": 16, "layer_types": kinds}
    vision = {key: value for key, value in VISION_3.items() if key != "deepstack_visual_indexes"}
    return hf.Qwen3_5MoeConfig(
        text_config={**text, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}, vision_config=vision
    )


def qwen3_omni() -> hf.PretrainedConfig:
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 32}
    audio |= {"num_mel_bins": 8, "downsample_hidden_size": 8, "n_window": 4}
    text = {**QWEN_MOE, "rope_parameters": MROPE}
    return hf.Qwen3OmniMoeThinkerConfig(text_config=text, vision_config=VISION_3, audio_config=audio)


def emu3() -> hf.PretrainedConfig:
    images = {"codebook_size": 16, "embed_dim": 8, "latent_channels": 8, "base_channels": 32, "hidden_size": 32}
    images |= {"channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "num_attention_heads": 1}
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    return hf.Emu3Config(text_config=text, vq_config=images, vocabulary_map={"<image>": 3})


def kimi_k25() -> hf.PretrainedConfig:
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return hf.Kimi_K25Config(text_config=hf.DeepseekV3Config(**DEEPSEEK), vision_config=vision)


def lfm2_moe() -> hf.PretrainedConfig:
    kinds = ["conv", "full_attention", "conv"]
    return hf.Lfm2MoeConfig(**TEXT, **EXPERTS, num_experts=4, num_dense_layers=1, layer_types=kinds)


MODELS: dict[str, tuple[str, Any]] = {
    "mixtral": ("MixtralForCausalLM", lambda: hf.MixtralConfig(**TEXT, num_local_experts=4)),
    "phimoe": ("PhimoeForCausalLM", lambda: hf.PhimoeConfig(**TEXT, num_local_experts=4)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", lambda: hf.Qwen3MoeConfig(**QWEN_MOE)),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", qwen3_vl_moe),
    "deepseek_v3": ("DeepseekV3ForCausalLM", lambda: hf.DeepseekV3Config(**DEEPSEEK)),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        lambda: hf.Glm4MoeConfig(**{**TEXT, **EXPERTS}, n_routed_experts=4, n_group=1, topk_group=1),
    ),
    "granite_moe": ("GraniteMoeForCausalLM", lambda: hf.GraniteMoeConfig(**TEXT, num_local_experts=4)),
    "aria": ("AriaForConditionalGeneration", aria),
    "glm4v_moe": ("Glm4vMoeForConditionalGeneration", glm4v_moe),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", qwen3_5_moe),
    "qwen3_omni": ("Qwen3OmniMoeThinkerForConditionalGeneration", qwen3_omni),
    "emu3": ("Emu3ForConditionalGeneration", emu3),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", kimi_k25),
    "lfm2_moe": ("Lfm2MoeForCausalLM", lfm2_moe),
    "phi": ("PhiForCausalLM", lambda: hf.PhiConfig(**{k: v for k, v in TEXT.items() if k != "head_dim"})),
    "starcoder2": ("Starcoder2ForCausalLM", lambda: hf.Starcoder2Config(**TEXT)),
    "gpt_neox": ("GPTNeoXForCausalLM", lambda: hf.GPTNeoXConfig(**TEXT)),
}


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    hf.utils.logging.disable_progress_bar()


def two_models(family: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    """The expert and the base, loaded from the files of save_pretrained."""
    kind, config = getattr(hf, MODELS[family][0]), MODELS[family][1]
    for role in ("expert", "base"):
        randomised(kind(config())).save_pretrained(folder / role)
    expert, base = (kind.from_pretrained(folder / role, dtype=torch.float32) for role in ("expert", "base"))
    return expert, base


def bind(prior: Prior, named: list[tuple[str, Tensor, Shard | None]]) -> list[BoundDelta | None]:
    binding = PriorBinding(prior)
    binding.check([(name, param) for name, param, _ in named])
    return binding.bind(named)


def bound(prior: Prior, model: nn.Module) -> dict[str, Tensor]:
    named = list(model.named_parameters())
    found = bind(prior, [(name, param, None) for name, param in named])
    deltas = {}
    for (name, param), delta in zip(named, found, strict=True):
        if delta is not None:
            whole = (
                delta.delta if delta.delta_scale is None else QuantizedDelta(delta.delta, delta.delta_scale).expand()
            )
            assert delta.delta_norm == pytest.approx(whole.double().norm().item(), rel=1e-5)
            assert delta.param_norm == pytest.approx(param.detach().double().norm().item(), rel=1e-5)
            deltas[name] = whole
    return deltas


@pytest.mark.parametrize("family", MODELS)
def test_every_projection_is_bound_to_the_difference_of_the_live_models(family: str, tmp_path: Path) -> None:
    expert, base = two_models(family, tmp_path)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=torch.float32)
    coverage = prior.match(base.named_parameters(), strict=True)
    deltas, theirs = bound(prior, base), dict(expert.named_parameters())
    for name, param in base.named_parameters():
        canonical = canonical_name(name)
        if module_of(canonical) in ("attn", "mlp") or (layer_of(canonical) is not None and ".experts" in name):
            assert torch.equal(deltas.pop(name), theirs[name].detach() - param.detach()), name
    assert not deltas
    assert not any("belong to no module" in warning for warning in prior.record["warnings"])
    assert coverage.summary().startswith(f"{len(prior)} of {len(prior)} deltas are bound")


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("box", [(slice(0, 1), slice(0, 32), slice(0, 96)), (slice(0, 1), slice(3, 9), slice(40, 60))])
def test_single_experts_fill_transposed_ones(experts: int, box: tuple[slice, ...]) -> None:
    """The layout of Qwen3-VL-MoE in transformers 4.57."""
    stem = "layers.0.mlp.experts."
    parts = {f"{stem}{e}.{p}_proj.weight": torch.randn(48, 32) for e in range(experts) for p in ("gate", "up")}
    parts |= {f"{stem}{e}.down_proj.weight": torch.randn(32, 48) for e in range(experts)}
    prior = Prior.from_mapping(parts)
    shapes = {"gate_up_proj": (experts, 32, 96), "down_proj": (experts, 48, 32)}
    named = [(f"model.{stem}{name}", nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    coverage = prior.match(named, strict=True)
    gates = [torch.cat([parts[f"{stem}{e}.{p}_proj.weight"] for p in ("gate", "up")]).T for e in range(experts)]
    gate_up = prior.load_stored(coverage.sources[named[0][0]])
    assert torch.equal(gate_up, torch.stack(gates))
    assert torch.equal(prior.load_stored(coverage.sources[named[0][0]], box=box), torch.stack(gates)[box])
    downs = torch.stack([parts[f"{stem}{e}.down_proj.weight"].T for e in range(experts)])
    assert torch.equal(prior.load_stored(coverage.sources[named[1][0]]), downs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_small_priors_of_single_experts(dtype: torch.dtype, tmp_path: Path) -> None:
    """The delta is that of the expanded parts: joined as codes for bfloat16 if their blocks fit together."""
    _, base = two_models("mixtral", tmp_path)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=dtype)
    sources = prior.coverage(base.named_parameters()).sources
    name = "model.layers.1.mlp.experts.gate_up_proj"
    stored = prior.load_stored(sources[name])
    assert isinstance(stored, QuantizedDelta) == (dtype != torch.bfloat16)
    whole = stored.expand() if isinstance(stored, QuantizedDelta) else stored
    gates = [[prior.load(f"layers.1.block_sparse_moe.experts.{e}.{w}.weight") for w in ("w1", "w3")] for e in range(4)]
    assert torch.equal(whole, torch.stack([torch.cat(pair) for pair in gates]))
    assert prior.info(sources[name]).delta_norm == pytest.approx(whole.double().norm().item(), rel=1e-6)
    for kind in (torch.float32, torch.bfloat16):  # codes are bound unexpanded only for bfloat16
        (delta,) = bind(prior, [(name, base.get_parameter(name).to(kind), None)])
        held = delta.delta if delta.delta_scale is None else QuantizedDelta(delta.delta, delta.delta_scale).expand()
        assert (delta.delta_scale is not None) == (kind == torch.bfloat16 and dtype != torch.bfloat16)
        assert torch.equal(held, whole)


def test_damage_to_one_of_the_deltas_that_are_joined(tmp_path: Path) -> None:
    _, base = two_models("mixtral", tmp_path)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    flip_bit(tmp_path / "prior", "layers.1.block_sparse_moe.experts.2.w3.weight")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    with pytest.raises(PriorFormatError, match=r"experts\.2\.w3\.weight is damaged: its checksum is"):
        bind(prior, [(name, base.get_parameter(name), None)])


def test_the_norm_of_shards_is_compared_with_that_of_the_parts(tmp_path: Path) -> None:
    _, base = two_models("mixtral", tmp_path)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    param = base.get_parameter(name)
    whole, half = (slice(0, 4), slice(0, 96), slice(0, 32)), (slice(0, 2), slice(0, 96), slice(0, 32))
    (delta,) = bind(prior, [(name, param, Shard((4, 96, 32), whole, ()))])
    assert torch.equal(delta.delta, prior.load_stored(prior.coverage([(name, param)]).sources[name]))
    with pytest.raises(PriorFormatError, match=r"layers\.1\.mlp\.experts\.gate_up_proj is damaged: its norm is"):
        bind(prior, [(name, param, Shard((4, 96, 32), half, ()))])


@pytest.mark.parametrize(
    "box", [(0, 2, 0, 96, 0, 32), (1, 3, 40, 60, 0, 32), (3, 4, 0, 48, 5, 7), (2, 2, 0, 96, 0, 32)]
)
@pytest.mark.parametrize("codes", [False, True])
def test_shards_read_their_box(box: tuple[int, ...], codes: bool) -> None:
    parts = {f"layers.0.mlp.experts.{e}.{p}_proj.weight": torch.randn(48, 32) for e in range(4) for p in ("gate", "up")}
    held = {name: quantize(delta, torch.int8) for name, delta in parts.items()} if codes else parts
    prior = Prior.from_mapping(held)
    param = nn.Parameter(torch.zeros(4, 96, 32))
    source = prior.coverage([("model.layers.0.mlp.experts.gate_up_proj", param)]).sources.popitem()[1]
    whole = prior.load_stored(source)
    whole = whole.expand() if isinstance(whole, QuantizedDelta) else whole
    cut = tuple(slice(begin, end) for begin, end in zip(box[::2], box[1::2], strict=True))
    part = prior.load_stored(source, box=Shard((4, 96, 32), cut, ()).box)
    assert torch.equal(part.expand() if isinstance(part, QuantizedDelta) else part, whole[cut])


def test_a_prior_of_fused_names_binds_to_single_experts() -> None:
    fused = {
        "layers.0.mlp.experts.gate_up_proj": torch.randn(3, 10, 7),
        "layers.0.mlp.experts.down_proj": torch.randn(3, 7, 5),
    }
    prior = Prior.from_mapping({f"model.{name}": delta for name, delta in fused.items()})
    named = [
        (
            f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight",
            nn.Parameter(torch.randn((7, 5) if w == "w2" else (5, 7))),
        )
        for e in range(3)
        for w in ("w1", "w2", "w3")
    ]
    assert prior.match(named, strict=True).matched
    found = bind(prior, [(name, param, None) for name, param in named])
    deltas = {name: delta.delta for (name, _), delta in zip(named, found, strict=True)}
    for e in range(3):
        stem = f"model.layers.0.block_sparse_moe.experts.{e}"
        gate, up = fused["layers.0.mlp.experts.gate_up_proj"][e].chunk(2)
        assert torch.equal(deltas[f"{stem}.w1.weight"], gate)
        assert torch.equal(deltas[f"{stem}.w3.weight"], up)
        assert torch.equal(deltas[f"{stem}.w2.weight"], fused["layers.0.mlp.experts.down_proj"][e])


def test_joined_convolutions_and_halves() -> None:
    stem = "layers.0.self_attn."
    stored = {f"{stem}{p}_conv1d.weight": (4, 1, 3) for p in "qk"} | {f"{stem}v_conv1d.weight": (6, 1, 3)}
    source = find_sources([("x", f"{stem}conv1d.weight", (14, 1, 3))], stored)["x"]
    assert [part.into[0] for part in source.parts] == [slice(0, 4), slice(4, 8), slice(8, 14)]
    halves = find_sources(
        [(p, f"layers.0.mlp.{p}_proj.weight", (5, 3)) for p in ("gate", "up")],
        {"layers.0.mlp.gate_up_proj.weight": (10, 3)},
    )
    assert [halves[p].parts[0].of[0] for p in ("gate", "up")] == [slice(0, 5), slice(5, 10)]


def test_other_models_and_incomplete_experts_are_not_bound() -> None:
    stem = "layers.0.mlp.experts."
    parts = {f"{stem}{e}.{p}_proj.weight": torch.randn(4, 3) for e in range(2) for p in ("gate", "up")}
    fused = nn.Parameter(torch.zeros(3, 8, 3))
    coverage = Prior.from_mapping(parts).coverage([(f"model.{stem}gate_up_proj", fused)])
    assert coverage.shape_mismatches == [(f"model.{stem}gate_up_proj", f"{stem}gate_up_proj", (3, 8, 3), (2, 8, 3))]
    gates = {name: delta for name, delta in parts.items() if "gate" in name}
    coverage = Prior.from_mapping(gates).coverage([(f"model.{stem}gate_up_proj", fused)])
    assert not coverage.matched
    assert coverage.prior_only == sorted(gates)
    assert "the prior lacks some of the deltas to fuse" in coverage.summary()
    # A model of three experts, and the deltas of two, fused.
    single = [(str(e), f"{stem}{e}.up_proj.weight", (4, 3)) for e in range(3)]
    assert list(find_sources(single, {f"{stem}gate_up_proj": (2, 8, 3)})) == ["0", "1"]
    # A parameter with its own delta is not given another's.
    live = [
        (f"model.layers.0.{m}.up_proj.weight", nn.Parameter(torch.zeros(4, 3))) for m in ("mlp", "block_sparse_moe")
    ]
    prior = Prior.from_mapping({"layers.0.block_sparse_moe.up_proj.weight": torch.randn(4, 3)})
    assert list(prior.match(live).matched) == ["model.layers.0.block_sparse_moe.up_proj.weight"]
    # Nor do two parameters share the deltas of one.
    experts = {f"layers.0.block_sparse_moe.experts.{e}.w2.weight": (4, 3) for e in range(2)}
    stacks = [(m, f"layers.0.{m}.experts.down_proj", (2, 4, 3)) for m in ("mlp", "block_sparse_moe")]
    assert list(find_sources(stacks, experts)) == ["mlp"]


def test_alpha_of_a_joined_delta_is_that_of_its_first_part_and_zero_where_a_part_is_left_alone() -> None:
    stored = {f"layers.{n}.block_sparse_moe.experts.{e}.w2.weight": torch.randn(4, 3) for n in (0, 1) for e in (0, 1)}
    named = [(f"model.layers.{n}.mlp.experts.down_proj", nn.Parameter(torch.randn(2, 4, 3))) for n in (0, 1)]

    def alphas(patterns: dict[str, float]) -> list[float | None]:
        binding = PriorBinding(Prior.from_mapping(stored), strengths=Strengths.split(patterns)[1])
        binding.check(named)
        return [delta and delta.alpha for delta in binding.bind([(name, param, None) for name, param in named])]

    assert alphas({"mlp": 0.5}) == [0.5, 0.5]
    assert alphas({"re:block_sparse_moe": 0.5}) == [0.5, 0.5]
    assert alphas({"re:layers.0.": 0.2, "mlp": 1.0}) == [0.2, 1.0]
    assert alphas({"re:layers.0.*experts.0": 0.2, "mlp": 1.0}) == [0.2, 1.0]
    assert alphas({"re:layers.0.*experts.1": 0.0, "mlp": 1.0}) == [None, 1.0]
    with pytest.raises(PriorMismatchError, match="patterns of alpha match none of the 2 matching deltas"):
        alphas({"re:experts.1": 1.0})


def test_a_stack_of_one_expert_has_the_parameters_shape() -> None:
    delta = torch.randn(4, 3)
    prior = Prior.from_mapping({"layers.0.mlp.experts.0.down_proj.weight": delta})
    param = nn.Parameter(torch.randn(1, 4, 3))
    (found,) = bind(prior, [("model.layers.0.mlp.experts.down_proj", param, None)])
    assert torch.equal(found.delta, delta[None])
    assert found.delta_norm == pytest.approx(delta.norm().item())


def test_tokens_that_were_added_beside_fused_experts() -> None:
    stored = {f"layers.0.mlp.experts.{e}.down_proj.weight": torch.randn(4, 3) for e in (0, 1)}
    prior = Prior.from_mapping({**stored, "embed_tokens.weight": torch.randn(5, 4)})
    named = [
        ("model.embed_tokens.weight", nn.Parameter(torch.randn(7, 4)), None),
        ("model.layers.0.mlp.experts.down_proj", nn.Parameter(torch.randn(2, 4, 3)), None),
    ]
    embed, experts = bind(prior, named)
    assert torch.equal(embed.delta, torch.cat([prior.load("embed_tokens.weight"), torch.zeros(2, 4)]))
    assert torch.equal(experts.delta, torch.stack(list(stored.values())))
