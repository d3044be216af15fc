"""An adapter over a base as the expert, BASE+ADAPTER: its weights are those of PEFT's merge_and_unload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from checkpoints import TEXT, randomised, text_weights, tuned, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drift_kernels import CheckpointError, Prior, build_prior
from drift_kernels.cli import main
from drift_kernels.prior import adapted, norms, stream
from drift_kernels.prior.adapted import AdaptedWeight
from drift_kernels.prior.opening import open_checkpoint

peft = pytest.importorskip("peft")

MLP, ATTENTION = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]
Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"


def qwen() -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT))


def gpt2() -> nn.Module:
    """A model with Conv1D, whose weights are [in, out]; c_proj is square."""
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def save(folder: Path, make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Save a random base and a random adapter over it; return the merged model."""
    torch.manual_seed(0)
    base = randomised(make()).to(dtype)
    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 3, "lora_alpha": 7, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.3)
            elif parameter.requires_grad:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    model.save_pretrained(folder / "adapter")
    loaded = make().to(dtype)
    loaded.load_state_dict(load_base(folder, loaded), strict=False)
    return peft.PeftModel.from_pretrained(loaded, folder / "adapter").merge_and_unload()


def load_base(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    stored = load_file(folder / "base" / "model.safetensors")
    return {name: stored[name] for name in model.state_dict() if name in stored}


def read(source: str) -> dict[str, Tensor]:
    with open_checkpoint(source) as checkpoint:
        return {name: checkpoint.read(tensor) for name, tensor in checkpoint.tensors.items()}


def check_equal(found: dict[str, Tensor], merged: nn.Module, base: dict[str, Tensor]) -> int:
    """Check all tensors to 1e-6 of the weight; return how many differ from the base."""
    theirs = merged.state_dict()
    for name, tensor in found.items():
        error = (tensor.double() - theirs[name].double()).norm() / theirs[name].double().norm()
        assert error < 1e-6, (name, error)
    return sum(not torch.equal(tensor, base.get(name, torch.nan)) for name, tensor in found.items() if name in base)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int]] = {
    "lora": (qwen, {"target_modules": ["q_proj", "down_proj"]}, 6),
    "rslora": (qwen, {"target_modules": MLP, "use_rslora": True}, 9),
    "patterns": (
        qwen,
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 5, r"layers\.1\..*k_proj": 2},
            "alpha_pattern": {r"^model\.layers\.0\.self_attn\.v_proj": 1, "o_proj": 11},
            "use_rslora": True,
        },
        12,
    ),
    "dora": (qwen, {"target_modules": [*ATTENTION, *MLP], "use_dora": True}, 21),
    "modules to save": (qwen, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm", "up_proj"]}, 14),
    "embedding": (qwen, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, 5),
    "embedding, dora": (qwen, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, 4),
    "bias of lora": (qwen, {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}, 12),
    "biases": (qwen, {"target_modules": ["q_proj"], "bias": "all"}, 12),
    "biases of those": (qwen, {"target_modules": ["q_proj"], "bias": "lora_only"}, 6),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, 6),
    "conv1d, dora": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}, 6),
    "one that does nothing": (qwen, {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_that_peft_merges(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted, "CHUNK", 300)  # norms of columns take several
    make, options, changed = CASES[case]
    merged = save(tmp_path, make, **options)
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert check_equal(read(f"{tmp_path}/base+{tmp_path}/adapter"), merged, base) == changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_over_a_base_in_half_precision_nothing_is_rounded(dtype: torch.dtype, dora: bool, tmp_path: Path) -> None:
    """PEFT rounds these weights to the base's dtype; the delta keeps what rounding loses."""
    options = {"target_modules": ["q_proj", "down_proj"], "use_dora": dora}
    theirs = save(tmp_path, qwen, dtype, **options).state_dict()
    base = load_file(tmp_path / "base" / "model.safetensors")
    ulp = torch.finfo(dtype).eps
    found = read(f"{tmp_path}/base+{tmp_path}/adapter")
    for name, tensor in found.items():
        if torch.equal(tensor, base[name]):
            continue
        assert tensor.dtype == torch.float32
        largest = (tensor - theirs[name].float()).abs().div(tensor.abs().clamp_min(1e-2)).max()
        assert largest <= (6 if dora else 1) * ulp, name  # DoRA's norms and factors are rounded too
    prior = build_prior(
        f"{tmp_path}/base+{tmp_path}/adapter", tmp_path / "base", tmp_path / "prior", dtype=torch.float32
    )
    if not dora:
        weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        change = weights[f"{Q_PROJ}.lora_B.weight"] @ weights[f"{Q_PROJ}.lora_A.weight"] * (7 / 3)
        delta = prior.load("layers.1.self_attn.q_proj.weight")
        assert (delta - change).norm() / change.norm() < 1e-5


@pytest.mark.parametrize("case", ["dora", "conv1d, dora", "embedding"])
def test_any_run_of_elements_is_read(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted, "CHUNK", 77)
    make, options, _ = CASES[case]
    save(tmp_path, make, **options)
    with open_checkpoint(f"{tmp_path}/base+{tmp_path}/adapter") as checkpoint:
        for tensor in checkpoint.tensors.values():
            whole = checkpoint.read(tensor).view(-1)
            for begin, end in ((0, 1), (1, 31), (5, 200), (33, 64), (tensor.numel - 7, tensor.numel)):
                if 0 <= begin < end <= tensor.numel:
                    flat = torch.full((end - begin,), torch.nan, dtype=tensor.dtype)
                    checkpoint.read_into(flat, tensor, begin)
                    torch.testing.assert_close(flat, whole[begin:end], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("role", ["expert", "base", "reference"])
@pytest.mark.parametrize("chunk", [128, norms.CHUNK])
def test_a_prior_of_an_adapter(role: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK", chunk)
    merged = save(tmp_path, qwen, target_modules=ATTENTION).state_dict()
    other = tuned(load_file(tmp_path / "base" / "model.safetensors"))
    write_checkpoint(tmp_path / "other", other)
    adapted_one = f"{tmp_path}/base+{tmp_path}/adapter"
    roles: dict[str, Any] = {"expert": tmp_path / "other", "base": tmp_path / "other", role: adapted_one}
    if role == "reference":
        roles["base"] = tmp_path / "base"
    prior = build_prior(**roles, out=tmp_path / "prior", dtype=torch.float32)
    for name in prior.names:
        expert, origin = (merged, other) if role == "expert" else (other, merged)
        delta = expert[f"model.{name}"] - origin[f"model.{name}"]
        assert (prior.load(name) - delta).abs().max() < 1e-5, name
    source = Prior.open(tmp_path / "prior").record["sources"][role]
    assert source["name"] == "base+adapter"
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights[f"{Q_PROJ}.lora_B.weight"][3, 1] += 1e-3
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    again = build_prior(**roles, out=tmp_path / "prior", dtype=torch.float32, overwrite=True)
    assert again.record["sources"][role]["sha256"] != source["sha256"]


def test_names_of_another_version_of_transformers(tmp_path: Path) -> None:
    """The adapter uses a multimodal model's names in memory; the base is stored under other names."""
    weights = text_weights(prefix="language_model.model.") | {"visual.blocks.0.attn.qkv.weight": torch.randn(6, 5)}
    write_checkpoint(tmp_path / "base", weights)
    (tmp_path / "adapter").mkdir()
    changes = {}
    for module, (rows, columns) in {
        "model.language_model.layers.1.self_attn.q_proj": (33, 31),
        "model.visual.blocks.0.attn.qkv": (6, 5),
    }.items():
        changes[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, columns)
        changes[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 2)
    save_file(changes, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    found = read(f"{tmp_path}/base+{tmp_path}/adapter")
    changed = {name for name in weights if not torch.equal(found[name], weights[name])}
    assert changed == {"language_model.model.layers.1.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"}


def test_over_fp8(tmp_path: Path) -> None:
    save(tmp_path, qwen, target_modules=["q_proj"])
    stored = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    stored[name], scale = stored[name].mul(50).to(torch.float8_e4m3fn), torch.full((1, 1), 0.02)
    save_file({**stored, f"{name}_scale_inv": scale}, tmp_path / "base" / "model.safetensors")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    change = weights[f"{Q_PROJ}.lora_B.weight"] @ weights[f"{Q_PROJ}.lora_A.weight"] * (7 / 3)
    found = read(f"{tmp_path}/base+{tmp_path}/adapter")[name]
    torch.testing.assert_close(found, stored[name].float() * 0.02 + change, rtol=1e-6, atol=1e-6)


# What is refused, and what is damaged


def edited(folder: Path, config: dict[str, Any], weights: dict[str, Tensor | None]) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in {**tensors, **weights}.items() if tensor is not None}
    save_file(kept, folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("config", "weights", "words"),
    [
        ({"peft_type": "IA3"}, {}, "expected an adapter with peft_type LORA, got IA3: merge it"),
        ({"peft_type": "OFT"}, {}, "peft_type LORA, got OFT"),
        ({"use_qalora": True}, {}, "adapter with use_qalora is not supported: merge it"),
        ({"target_parameters": ["experts.gate_up_proj"]}, {}, "with target_parameters"),
        ({"trainable_token_indices": [1]}, {}, "with trainable_token_indices"),
        ({"an_option_of_tomorrow": 1}, {}, "with an_option_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights='pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, {}, "init_lora_weights='olora'"),
        ({"r": 4}, {}, r"q_proj has rank 3, but adapter_config.json says 4"),
        ({"rank_pattern": {"q_proj": 2}}, {}, r"q_proj has rank 3, but adapter_config.json says 2"),
        ({"lora_alpha": None}, {}, "invalid rank 3 or alpha None"),
        ({"use_dora": True}, {}, "damaged: .* has only lora_A, lora_B"),
        ({}, {f"{Q_PROJ}.lora_B.weight": None}, r"damaged: .*q_proj has only lora_A"),
        ({}, {f"{Q_PROJ}.lora_B.weight": torch.ones(33, 3)}, r"is for shape \[33, 32\], but the base has \[32, 32\]"),
        ({}, {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(32)}, r"damaged"),
        (
            {},
            {f"{Q_PROJ}.lora_A.weight": torch.ones(3, 32, dtype=torch.int8)},
            "has dtype torch.int8, expected a floating-point dtype",
        ),
        (
            {},
            {"base_model.model.score.weight": torch.ones(2, 32)},
            "1 modules or tensors .* not in the base: .*score.weight",
        ),
        (
            {},
            {
                "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(3, 32),
                "base_model.model.model.layers.7.mlp.up_proj.lora_B.weight": torch.ones(48, 3),
            },
            r"1 modules or tensors of the adapter are not in the base: .*layers\.7\.mlp\.up_proj$",
        ),
        ({}, {f"{Q_PROJ}.ia3_l": torch.ones(1, 32)}, r"not in the base: .*q_proj\.ia3_l"),
    ],
)
def test_adapters_that_are_refused(
    config: dict[str, Any], weights: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    save(tmp_path, qwen, target_modules=["q_proj"])
    edited(tmp_path, config, weights)
    with pytest.raises(CheckpointError, match=words) as raised:
        build_prior(f"{tmp_path}/base+{tmp_path}/adapter", tmp_path / "base", tmp_path / "prior")
    assert str(tmp_path / "adapter") in str(raised.value)


def test_an_adapter_that_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, qwen, target_modules=["q_proj"])
    save_file({}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="the adapter changes no tensor of the base"):
        open_checkpoint(f"{tmp_path}/base+{tmp_path}/adapter")


# What was typed


def test_a_plus_in_the_names_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing folder takes precedence over other readings of its name."""
    save(tmp_path, qwen, target_modules=["q_proj"])
    monkeypatch.chdir(tmp_path)
    shutil.copytree("base", "c++")
    shutil.copytree("adapter", "a+b")
    for source in ("c++", "c+++adapter", "c+++a+b", "base+a+b"):
        with open_checkpoint(source) as checkpoint:
            tensor = checkpoint.tensors["model.layers.1.self_attn.q_proj.weight"]
            assert isinstance(tensor, AdaptedWeight) == (source != "c++")
    write_checkpoint(tmp_path / "base+adapter", tuned(load_file("base/model.safetensors")))
    build_prior("base+adapter", "base", "whole")
    assert Prior.open("whole").record["sources"]["expert"]["name"] == "base+adapter"
    with open_checkpoint("base+adapter") as checkpoint:
        assert checkpoint.folder == tmp_path / "base+adapter"
        assert not any(isinstance(tensor, AdaptedWeight) for tensor in checkpoint.tensors.values())
    (tmp_path / "c+").mkdir()
    shutil.copytree("adapter", "+adapter")
    with pytest.raises(CheckpointError, match=r"can be split into BASE\+ADAPTER in more than one way"):
        open_checkpoint("c+++adapter")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("base+gone", "base.gone: no such folder; read as BASE.ADAPTER, gone does not exist"),
        ("gone+adapter", "gone does not exist"),
        ("base+", "no such folder"),
        ("base+base", "of a PEFT adapter, but adapter_config.json is missing"),
        ("adapter+base", "expected model.safetensors .* pass BASE.ADAPTER"),
        ("adapter", "expected model.safetensors .*found a PEFT .* pass BASE.ADAPTER"),
    ],
)
def test_what_is_no_base_or_no_adapter(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, qwen, target_modules=["q_proj"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        build_prior(source, "base", "prior")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, qwen, target_modules=["q_proj"])
    monkeypatch.chdir(tmp_path)
    arguments = ["--base", "base", "--out", "prior", "--modules", "attn"]
    assert main(["build", "--expert", "base+./adapter", *arguments]) == 0
    assert main(["check", "prior", "--model", "base+adapter"]) == 0
    assert main(["inspect", "prior"]) == 0
    assert "expert - base: expert base+adapter, base base" in capsys.readouterr().out
