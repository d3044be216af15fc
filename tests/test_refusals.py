"""Checkpoints that a build rejects, because the prior would cover only a rest of them, or nothing."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

import pytest
import torch
from checkpoints import text_weights, write_checkpoint
from torch import Tensor

from drift_kernels import CheckpointError, Prior, PriorError, build_prior

WEIGHT = "model.layers.1.self_attn.q_proj.weight"
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
I32, U8, F8 = torch.int32, torch.uint8, torch.float8_e4m3fn

# What replaces a weight, by method: suffix after its module's name -> the tensor; the words of the error.
QUANTISED = {
    "gptq": ({"qweight": I32, "qzeros": I32, "scales": torch.float16, "g_idx": I32}, r"GPTQ or AWQ"),
    "awq": ({"qweight": I32, "qzeros": I32, "scales": torch.float16}, r"GPTQ or AWQ"),
    "bitsandbytes 4 bit": (
        {"weight": U8, "weight.absmax": U8, "weight.quant_map": torch.float32, "weight.nested_absmax": torch.float32}
        | {"weight.nested_quant_map": torch.float32, "weight.quant_state.bitsandbytes__nf4": U8},
        "bitsandbytes",
    ),
    "bitsandbytes 8 bit": ({"weight": torch.int8, "SCB": torch.float32, "weight_format": U8}, "bitsandbytes"),
    "compressed-tensors": (
        {"weight_packed": I32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64},
        "compressed-tensors",
    ),
    "mxfp8": ({"weight": F8, "weight_scale": U8}, "FP8, NVFP4 or compressed-tensors"),
    "nvfp4": ({"weight": U8, "weight_scale": F8, "weight_scale_2": torch.float32}, "FP8, NVFP4 or compressed-tensors"),
    "fp8 with a zero point": ({"weight": F8, "weight_scale_inv": torch.float32, "weight_zero_point": F8}, "FP8"),
    "hqq": ({"W_q": U8, "scale": torch.bfloat16, "zero": torch.bfloat16}, "HQQ"),
    "quanto": ({"weight._data": torch.int8, "weight._scale": torch.float32}, "Quanto"),
    "eetq": ({"weight": torch.int8, "weight_scales": torch.float16}, "EETQ"),
    "torchao": ({"_weight_qdata": torch.int8, "_weight_scale": torch.float32}, "torchao"),
    "aqlm": ({"codes": torch.int16, "codebooks": torch.float16, "scales": torch.float16}, "AQLM"),
}


def write(folder: Path, **weights: dict[str, Tensor]) -> None:
    for role, tensors in weights.items():
        write_checkpoint(folder / role, tensors)


def quantised(weights: dict[str, Tensor], method: str, name: str = WEIGHT) -> dict[str, Tensor]:
    kept = {key: tensor for key, tensor in weights.items() if key != name}
    stem = name.removesuffix("weight")
    return kept | {stem + part: torch.zeros(8, dtype=dtype) for part, dtype in QUANTISED[method][0].items()}


@pytest.mark.parametrize("role", ["expert", "base", "reference"])
@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_checkpoints_are_refused_by_name(tmp_path: Path, method: str, role: str) -> None:
    """A single weight is enough; its bias and the other weights keep their names."""
    roles = {name: text_weights() for name in ("expert", "base", "reference")}
    roles[role] = quantised(roles[role], method)
    write(tmp_path, **roles)
    words = (
        rf"the {role} is quantised \({QUANTISED[method][1]}\): 1 of .*q_proj\.weight; dequantise the checkpoint first"
    )
    options = {"reference": tmp_path / "reference"} if role == "reference" else {}
    with pytest.raises(CheckpointError, match=words):
        build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", **options)
    assert not (tmp_path / "prior").exists()


def test_quantised_whole_on_both_sides(tmp_path: Path) -> None:
    weights = {WEIGHT: torch.randn(4, 4), WEIGHT.replace("weight", "bias"): torch.randn(4)}
    write(tmp_path, expert=quantised(weights, "gptq"), base=quantised(weights, "gptq"))
    with pytest.raises(CheckpointError, match="is quantised"):
        build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")


def test_fused_experts_in_blocks_are_refused(tmp_path: Path) -> None:
    base = text_weights() | {EXPERTS: torch.randn(2, 4, 6)}
    expert = text_weights() | {f"{EXPERTS}_{part}": torch.zeros(2, 4, 3, dtype=U8) for part in ("blocks", "scales")}
    write(tmp_path, expert=expert, base=base)
    with pytest.raises(CheckpointError, match=r"is quantised \(MXFP4\).*experts\.gate_up_proj; dequantise"):
        build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")


def test_names_of_gguf_are_refused(tmp_path: Path) -> None:
    write(tmp_path, expert={"blk.0.attn_q.weight": torch.randn(4, 4)}, base=text_weights())
    with pytest.raises(CheckpointError, match=r"GGUF names.*blk\.0\.attn_q\.weight"):
        build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")


@pytest.mark.parametrize("nested", [False, True])
def test_the_config_knows_the_method_better(tmp_path: Path, nested: bool) -> None:
    """Even for a method whose names are unknown here."""
    base = text_weights()
    config: dict[str, object] = {"quantization_config": {"quant_method": "newest"}}
    expert = {name: tensor for name, tensor in base.items() if name != WEIGHT}
    expert[WEIGHT.replace("weight", "squeezed")] = torch.zeros(3, dtype=U8)
    write_checkpoint(tmp_path / "expert", expert, config={"text_config": config} if nested else config)
    write_checkpoint(tmp_path / "base", base)
    with pytest.raises(CheckpointError, match=r"the expert is quantised \(newest\)"):
        build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")


def test_what_is_not_asked_for_may_be_quantised(tmp_path: Path) -> None:
    """A vision tower, another module, and scales of a cache beside plain weights."""
    base, expert = text_weights(), text_weights()
    tower = "visual.blocks.0.attn.qkv.weight"
    base |= quantised({tower: torch.randn(3, 3)}, "awq", tower)
    base = quantised(base, "gptq", "model.layers.0.mlp.up_proj.weight")
    expert |= {"model.layers.0.self_attn.k_proj.output_scale": torch.ones(1)}
    write_checkpoint(tmp_path / "base", base, config={"quantization_config": {"quant_method": "awq"}})
    write_checkpoint(tmp_path / "expert", expert)
    assert len(build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", modules=["attn"])) == 3 * 5


@pytest.mark.parametrize("form", ["unmerged", "older", "dora", "saved whole"])
@pytest.mark.parametrize("role", ["expert", "base"])
def test_adapters_that_are_not_merged_are_refused(tmp_path: Path, role: str, form: str) -> None:
    roles = {"expert": text_weights(), "base": text_weights()}
    weights = {f"base_model.model.{name}": tensor for name, tensor in roles[role].items()}
    name = f"base_model.model.{WEIGHT}"
    stem = name.removesuffix("weight")
    parts = {f"{stem}lora_{part}.default.weight": torch.zeros(2, 2) for part in "AB"}
    if form == "saved whole":
        parts = {
            f"{stem}{part}.weight": weights[name].clone() for part in ("original_module", "modules_to_save.default")
        }
    if form == "dora":
        parts[f"{stem}lora_magnitude_vector.default.weight"] = torch.zeros(2)
    if form in ("unmerged", "dora"):
        parts[f"{stem}base_layer.weight"] = weights[name]
    if form != "older":
        del weights[name]
    roles[role] = weights | parts
    write(tmp_path, **roles)
    with pytest.raises(
        CheckpointError,
        match=rf"the {role} contains adapters .*1 of .*q_proj\.weight.*pass BASE\+ADAPTER.*merge_and_unload",
    ):
        build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", modules=["mlp"])
    assert len(prior) == 3 * 3


def test_the_folder_of_an_adapter_is_refused(tmp_path: Path) -> None:
    adapter = write_checkpoint(tmp_path / "expert", {f"{WEIGHT}.lora_A.weight": torch.randn(2, 3)})
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    write(tmp_path, base=text_weights())
    with pytest.raises(CheckpointError, match=r"a PEFT \(LoRA\) adapter"):
        build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")


# Deltas that are zero, or too large


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_an_expert_that_is_the_base_makes_no_prior(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path, expert=text_weights(), base=text_weights())
    for options in ({"base": tmp_path / "expert"}, {"base": tmp_path / "base", "reference": tmp_path / "expert"}):
        with pytest.raises(PriorError, match=r"all 24 deltas are zero.*saved without its changes"):
            build_prior(tmp_path / "expert", out=tmp_path / "prior", dtype=dtype, **options)
        assert not list(tmp_path.glob("prior*"))


def test_some_zero_deltas_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = text_weights()
    expert = {name: w + 0.01 * torch.randn_like(w) for name, w in base.items()}
    expert |= {name: w for name, w in base.items() if "layers.2.self_attn" in name}
    write(tmp_path, expert=expert, base=base)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    said = "5 of 24 deltas are zero: layers.2.self_attn.k_proj.weight, layers.2.self_attn.o_proj.weight"
    assert [warning[: len(said)] for warning in prior.record["warnings"]] == [said]
    assert said in caplog.text


def test_zero_deltas_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PriorError, match="all 2 deltas are zero"):
        Prior.from_mapping({"a": torch.zeros(3), "b": torch.zeros(2, 2).bfloat16(), "c": torch.zeros(0, 4)})
    Prior.from_mapping({"a": torch.zeros(3), "b": torch.ones(2)})
    assert "1 of 2 deltas are zero: a" in caplog.text


def test_a_pair_of_unrelated_models_is_noticed(tmp_path: Path) -> None:
    """The ratio is given in two digits; bfloat16 changes a norm by 2^-8 of it at most."""
    base, expert = text_weights(), text_weights()
    write(tmp_path, expert=expert, base=base)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    (warning,) = prior.record["warnings"]
    ratio = median(
        float((expert[name] - w).norm() / w.norm()) for name, w in base.items() if "layers" in name and w.dim() > 1
    )
    found = re.search(r"the median of norm\(delta\)/norm\(W\) is (\d\.\d\d)\)", warning)
    assert found is not None
    assert float(found[1]) == pytest.approx(ratio, abs=0.005 + 2**-8 * ratio + 1e-5)


def test_a_tied_head_is_the_reason_that_is_given(tmp_path: Path) -> None:
    write(tmp_path, expert=text_weights(), base=text_weights())
    with pytest.raises(
        PriorError, match=r"(?s)share no tensor of modules head: .*base's head is tied to its embedding"
    ):
        build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", modules=["head"])
