"""Adding a prior to a checkpoint: correct values, every other byte unchanged, and a folder that transformers loads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from checkpoints import TEXT, flip_bit, text_weights, write_checkpoint
from merges import EVERYTHING, Family
from safetensors.torch import load_file, save_file
from test_unfusing import FUSED, fused_by_transformers, save_base, save_expert
from torch import Tensor

from drift_kernels import (
    CheckpointError,
    Prior,
    PriorError,
    PriorFormatError,
    PriorMismatchError,
    apply_prior,
    build_prior,
)
from drift_kernels.prior import canonical_name, runs
from examples import tiny

UP = "model.layers.1.mlp.up_proj.weight"


def loaded(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family.write(tmp_path)


def write(folder: Path, weights: dict[str, Tensor], dtype: torch.dtype, shards: int = 1) -> None:
    write_checkpoint(folder, {name: tensor.to(dtype) for name, tensor in weights.items()}, shards=shards)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_sum_is_rounded_once(
    tmp_path: Path, dtype: torch.dtype, stored: torch.dtype, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, whatever the piece size; tensors without a delta are unchanged."""
    base, expert = text_weights(), text_weights(prefix="language_model.model.")
    name = "layers.1.mlp.down_proj.weight"
    base[f"model.{name}"], expert[f"language_model.model.{name}"] = torch.randn(2, 300, 31)  # several pieces
    write(tmp_path / "base", base, dtype, shards)
    write_checkpoint(tmp_path / "expert", expert)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=stored)
    wide = torch.promote_types(dtype, torch.float32)
    for chunk in (1 << 19, 1):
        monkeypatch.setattr(runs, "CHUNK", chunk)
        coverage = apply_prior(prior, tmp_path / "base", tmp_path / "out", scale=0.3, overwrite=True)
        result = loaded(tmp_path / "out")
        assert set(result) == set(base)
        assert coverage.matched == {name: canonical_name(name) for name in base if canonical_name(name) in prior.names}
        for name, weight in base.items():
            weight = weight.to(dtype)
            if name in coverage.matched:
                delta = prior.load(canonical_name(name)).float()
                assert torch.equal(result[name], (weight.to(wide) + 0.3 * delta.to(wide)).to(dtype))
                assert not torch.equal(result[name], weight)
            else:
                assert torch.equal(result[name], weight)


def test_scale_one_is_the_expert(tmp_path: Path) -> None:
    """Bitwise: the difference of numbers within a factor of two of each other is exact."""
    base = text_weights()
    expert = {name: weight * (1 + 0.1 * torch.rand_like(weight)) for name, weight in base.items()}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "expert", expert)
    options = {"reference": tmp_path / "base", "modules": EVERYTHING, "dtype": torch.float32}
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", **options)
    apply_prior(prior, tmp_path / "base", tmp_path / "out")
    result = loaded(tmp_path / "out")
    assert all(torch.equal(result[name], expert[name]) for name in expert)


@pytest.mark.parametrize("shards", [1, 2])
def test_files_beside_the_weights(family: Family, shards: int) -> None:
    base = write_checkpoint(family.folder / "whole", family.weights["base"], shards=shards, config={"x": 1})
    kept = ["tokenizer.json", "vocab.txt", "chat_template.jinja", "modeling_x.py", "LICENSE", "tokenizer.model"]
    kept.append("additional_chat_templates/tool.jinja")
    left = [
        "README.md",
        "pytorch_model.bin",
        "optimizer.pt",
        "adapter_config.json",
        "trainer_state.json",
        "x.safetensors",
    ]
    left += [".gitattributes", "pytorch_model.bin.index.json", "checkpoint-1/config.json", "drift_applied.json"]
    for name in kept + left:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"this is {name}")
    apply_prior(family.prior("a"), base, family.folder / "out")
    out = family.folder / "out"
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    weights = {path.name for path in base.glob("model*.safetensors*")}
    assert len(weights) == (1 if shards == 1 else 3)
    assert written == {*kept, *weights, "config.json", "drift_applied.json"}
    for name in [*kept, "config.json", *(name for name in weights if name.endswith(".json"))]:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    record = json.loads((out / "drift_applied.json").read_text())
    assert record["scale"] == 1
    assert record["prior"]["fingerprint"] == Prior.open(family.folder / "prior-a").fingerprint
    assert str(family.folder) not in (out / "drift_applied.json").read_text()


def test_transformers_loads_it(tmp_path: Path) -> None:
    """With its tokenizer; weights in memory are the base's plus the scaled differences."""
    base, expert = tiny.base_and_expert()
    base.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    prior = build_prior(
        tmp_path / "expert", tmp_path / "base", tmp_path / "prior", modules=("full",), dtype=torch.float32
    )
    apply_prior(prior, tmp_path / "base", tmp_path / "out", scale=0.5)
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == tiny.tokenizer().vocab_size
    theirs = dict(expert.named_parameters())
    for (name, param), before in zip(merged.named_parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(param, (before + theirs[name]) / 2)
        assert torch.equal(param, before) == torch.equal(theirs[name], before)


def in_memory(folder: Path) -> dict[str, Tensor]:
    kind = hf.Qwen3VLMoeForConditionalGeneration
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("transposed", [True, pytest.param(False, marks=fused_by_transformers)])
def test_fused_experts_and_deltas_one_by_one(tmp_path: Path, transposed: bool) -> None:
    """In the base's form, Qwen3-VL-MoE: with scale 1, its experts become the expert's."""
    save_base(tmp_path / "base", 24, transposed)
    expert = save_expert(tmp_path / "expert", 24)
    options = {"modules": ("mlp",), "dtype": torch.float32}
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", **options)
    assert any(".experts.0." in name for name in prior.names)
    apply_prior(prior, tmp_path / "base", tmp_path / "out")
    result = loaded(tmp_path / "out")
    for layer in range(TEXT["num_hidden_layers"]):
        for leaves, fused in ((("gate_proj", "up_proj"), "gate_up_proj"), (("down_proj",), "down_proj")):
            found = result[FUSED.format(layer, fused)]
            stem = f"model.layers.{layer}.mlp.experts."
            expected = torch.stack(
                [torch.cat([expert[f"{stem}{e}.{leaf}.weight"] for leaf in leaves]) for e in range(4)]
            )
            torch.testing.assert_close(found, expected.mT if transposed else expected, rtol=1e-5, atol=1e-6)
    before, after = in_memory(tmp_path / "base"), in_memory(tmp_path / "out")
    sources = prior.match(before.items(), strict=True).sources
    for name, param in before.items():
        delta = prior.load_stored(sources[name]) if name in sources else torch.zeros_like(param)
        assert torch.equal(after[name], param + delta)


def test_single_experts_and_fused_deltas(tmp_path: Path) -> None:
    expert = save_expert(tmp_path / "base", 24)
    fused = torch.randn(4, 48, TEXT["hidden_size"])
    apply_prior({"layers.1.mlp.experts.gate_up_proj": fused}, tmp_path / "base", tmp_path / "out", scale=-2)
    result, stem = loaded(tmp_path / "out"), "model.layers.1.mlp.experts."
    for e in range(4):
        for leaf, rows in (("gate_proj", slice(0, 24)), ("up_proj", slice(24, 48))):
            name = f"{stem}{e}.{leaf}.weight"
            assert torch.equal(result[name], expert[name] + -2 * fused[e, rows])


def test_square_matrices_of_fused_experts(tmp_path: Path) -> None:
    """They may be transposed or not."""
    stack = "model.language_model.layers.0.mlp.experts.down_proj"
    config = {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 8, "moe_intermediate_size": 8}}
    single = {f"layers.0.mlp.experts.{e}.down_proj.weight": torch.randn(8, 8) for e in (0, 1)}
    write_checkpoint(tmp_path / "base", {stack: torch.zeros(2, 8, 8)}, config=config)
    with pytest.raises(PriorError, match=r"cannot tell whether the fused experts in .* are transposed"):
        apply_prior(single, tmp_path / "base", tmp_path / "out")
    write_checkpoint(tmp_path / "straight", {stack: torch.zeros(2, 8, 8)}, config={"model_type": "deepseek_ocr2_text"})
    apply_prior(single, tmp_path / "straight", tmp_path / "out")
    assert torch.equal(loaded(tmp_path / "out")[stack], torch.stack(list(single.values())))


def test_tokens_that_were_added_stay(family: Family) -> None:
    weights = dict(family.weights["base"])
    name = "model.embed_tokens.weight"
    weights[name] = torch.cat([weights[name], torch.randn(12, 31)])
    write_checkpoint(family.folder / "grown", weights)
    prior = family.prior("a")
    apply_prior(prior, family.folder / "grown", family.folder / "out")
    result, delta = loaded(family.folder / "out")[name], prior.load("embed_tokens.weight")
    assert torch.equal(result[:101], weights[name][:101] + delta)
    assert torch.equal(result[101:], weights[name][101:])


def test_scalars_empty_tensors_and_other_dtypes(tmp_path: Path) -> None:
    weights = {"layers.0.gain": torch.tensor(2.0), "layers.0.none": torch.ones(0, 3), "layers.0.w": torch.ones(2, 2)}
    others = {"steps": torch.tensor([7]), "flags": torch.tensor([True, False])}
    write_checkpoint(tmp_path / "base", weights | others)
    prior = {name: tensor + 1 for name, tensor in weights.items()}
    apply_prior(prior, tmp_path / "base", tmp_path / "out")
    result = loaded(tmp_path / "out")
    assert result["layers.0.gain"] == 5
    assert torch.equal(result["layers.0.w"], torch.full((2, 2), 3.0))
    assert all(torch.equal(result[name], tensor) for name, tensor in others.items())


def test_deltas_without_a_weight(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    prior = {UP: torch.ones(63, 31), "layers.7.mlp.up_proj.weight": torch.ones(63, 31)}
    with pytest.raises(PriorMismatchError, match=r"1 deltas have no parameter: layers\.7\.(.|\n)*--partial"):
        apply_prior(prior, family.folder / "base", family.folder / "out")
    coverage = apply_prior(prior, family.folder / "base", family.folder / "out", partial=True)
    assert coverage.prior_only == ["layers.7.mlp.up_proj.weight"]
    assert "1 of 2 deltas are bound" in caplog.text
    with pytest.raises(PriorMismatchError, match="0 of 1 deltas"):
        apply_prior({"layers.7.x.weight": torch.ones(3)}, family.folder / "base", family.folder / "no", partial=True)


@pytest.mark.parametrize("partial", [False, True])
def test_another_shape(family: Family, partial: bool) -> None:
    with pytest.raises(PriorMismatchError, match=rf"{UP} \[63, 31\] vs\. \[31, 63\]"):
        apply_prior({UP: torch.ones(31, 63)}, family.folder / "base", family.folder / "out", partial=partial)
    assert not (family.folder / "out").exists()


def test_quantised_bases_and_adapters_are_refused(family: Family) -> None:
    prior, weight = family.prior("a", modules=("mlp",)), torch.ones(63, 31)
    eight = {**family.weights["base"], UP: weight.to(torch.float8_e4m3fn), f"{UP}_scale_inv": torch.ones(1, 1)}
    packed = {k: v for k, v in family.weights["base"].items() if k != UP} | {
        UP.replace("weight", "qweight"): torch.ones(3, 3)
    }
    adapted = {k: v for k, v in family.weights["base"].items() if k != UP}
    adapted |= {UP.replace("weight", "base_layer.weight"): weight + 1, UP.replace("weight", "lora_A.weight"): weight}
    for name, weights, message in (
        ("eight", eight, "the base is quantised"),
        ("packed", packed, "the base is quantised"),
        ("adapted", adapted, "adapters that are not merged"),
    ):
        write_checkpoint(family.folder / name, weights)
        for partial in (False, True):
            with pytest.raises(CheckpointError, match=message):
                apply_prior(prior, family.folder / name, family.folder / "out", partial=partial)
    assert not list(family.folder.glob("out*"))


def test_what_is_in_the_way(family: Family) -> None:
    prior, base, out = family.prior("a"), family.folder / "base", family.folder / "out"
    for target in (base, family.folder):
        with pytest.raises(PriorError, match=r"would replace .*base, which it is made from"):
            apply_prior(prior, base, target, overwrite=True)
    link = family.folder / "link"
    link.symlink_to(base)
    for one, other in ((link, base), (base, link)):
        with pytest.raises(PriorError, match="which it is made from"):
            apply_prior(prior, one, other, overwrite=True)
    with pytest.raises(PriorError, match=r"prior-a, which it is made from"):
        apply_prior(family.folder / "prior-a", base, family.folder / "prior-a", overwrite=True)
    for foreign in (family.folder / "b", family.folder / "prior-a"):
        with pytest.raises(PriorError, match="is not a checkpoint that a prior was applied to, so it is not replaced"):
            apply_prior(prior, base, foreign, overwrite=True)
    apply_prior(prior, base, out)
    with pytest.raises(PriorError, match="already exists"):
        apply_prior(prior, base, out)
    apply_prior(prior, base, out, scale=2, overwrite=True)
    assert json.loads((out / "drift_applied.json").read_text())["scale"] == 2
    with pytest.raises(PriorError, match="which it is made from"):
        apply_prior(prior, out, out, overwrite=True)


@pytest.mark.parametrize("scale", [0, 0.0, math.nan, math.inf])
def test_scales_that_say_nothing(family: Family, scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be finite and not 0"):
        apply_prior(family.prior("a"), family.folder / "base", family.folder / "out", scale=scale)


def test_overflow_names_the_tensor_and_leaves_nothing(family: Family) -> None:
    write(family.folder / "half", family.weights["base"], torch.float16)
    with pytest.raises(PriorError, match=rf"{UP} contains NaN or Inf in the base, or overflows in torch\.float16"):
        apply_prior({UP: torch.full((63, 31), 7e4)}, family.folder / "half", family.folder / "out")
    assert not list(family.folder.glob("out*"))


def test_damaged_priors_leave_nothing(family: Family) -> None:
    family.prior("a")
    flip_bit(family.folder / "prior-a", "norm.weight")
    with pytest.raises(PriorFormatError, match="is damaged: its checksum"):
        apply_prior(family.folder / "prior-a", family.folder / "base", family.folder / "out")
    assert not list(family.folder.glob("out*"))


def test_damage_to_a_delta_of_which_single_experts_take_parts(tmp_path: Path) -> None:
    for role in ("expert", "base"):
        save_base(tmp_path / role, 24, transposed=False)
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", modules=("mlp",), dtype=torch.float32)
    single = save_expert(tmp_path / "single", 24)
    flip_bit(tmp_path / "prior", "layers.1.mlp.experts.gate_up_proj")
    damage = pytest.raises(PriorFormatError, match=r"experts\.\w+ is damaged: its checksum")
    with damage:
        apply_prior(tmp_path / "prior", tmp_path / "single", tmp_path / "out", partial=True)
    assert not list(tmp_path.glob("out*"))
    prior = Prior.open(tmp_path / "prior")
    with damage:
        for source in prior.coverage(single.items()).sources.values():
            prior.load_stored(source)


def test_an_index_does_not_reach_out_of_the_folder(family: Family) -> None:
    base = write_checkpoint(family.folder / "outer" / "inner", family.weights["base"], shards=2)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    shutil.move(base / "model-00001-of-00002.safetensors", base.parent / "x.safetensors")
    text = json.dumps(index).replace("model-00001-of-00002", "../x")
    (base / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="lists a file outside the folder"):
        apply_prior(family.prior("a"), base, family.folder / "outer" / "out")
    assert sorted(path.name for path in base.parent.iterdir()) == ["inner", "x.safetensors"]


def test_metadata_and_order_of_a_file_stay(family: Family) -> None:
    base = family.folder / "noted"
    write_checkpoint(base, {})
    save_file(family.weights["base"], base / "model.safetensors", {"format": "pt", "note": "é"})
    apply_prior(family.prior("a"), base, family.folder / "out")
    before, after = ((f / "model.safetensors").read_bytes() for f in (base, family.folder / "out"))
    size = 8 + int.from_bytes(before[:8], "little")
    assert before[:size] == after[:size]
    assert len(before) == len(after)
