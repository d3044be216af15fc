"""drift-prior init-lora: PEFT loads the folder, and A matches LAPACK's singular vectors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import FAMILIES, TEXT
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from drift_kernels import CheckpointError, Prior, PriorError, PriorMismatchError, build_prior, combine_priors
from drift_kernels.cli import main
from drift_kernels.prior.init_lora import init_lora
from drift_kernels.prior.names import canonical_name

RANK = 4
KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(params=["qwen2", "qwen2_5_vl"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    """A base of three layers in `tmp_path / base`, and a prior of an expert beside it."""
    torch.manual_seed(0)
    if request.param == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))
    else:
        model = FAMILIES[request.param].base()
    model.save_pretrained(tmp_path / "base")
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)).save_pretrained(tmp_path / "expert")
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=torch.float32)
    return model.eval()


def output(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(8, 30)[None]).logits


def loaded(base: nn.Module, folder: Path) -> PeftModel:
    """Load without a warning from PEFT about missing or unknown keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
        again = model.load_adapter(folder, "again")
    assert (again.missing_keys, again.unexpected_keys) == ([], [])
    return model


@pytest.mark.parametrize("options", [{}, {"alpha": 9}, {"alpha": 2.5, "rslora": True}], ids=str)
def test_peft_loads_it_and_the_output_is_the_bases(base: nn.Module, options: dict[str, Any], tmp_path: Path) -> None:
    expected = output(base)
    fits = init_lora(tmp_path / "prior", tmp_path / "base", tmp_path / "adapter", rank=RANK, **options)
    assert len(fits) == 3 * len(KINDS)
    assert not any("visual" in name for name in fits)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "drift_init_lora.json"}
    model = loaded(base, tmp_path / "adapter")
    assert torch.equal(output(model), expected)
    config = model.peft_config["default"]
    assert (config.r, config.use_rslora) == (RANK, options.get("rslora", False))
    assert config.lora_alpha == options.get("alpha", RANK)
    assert config.base_model_name_or_path == str(tmp_path / "base")
    adapted = {name: m for name, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert set(adapted) == set(fits)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 2 * len(fits)
    for name, module in adapted.items():
        assert torch.equal(module.lora_A["default"].weight, stored[f"base_model.model.{name}.lora_A.weight"])
        assert not module.lora_B["default"].weight.any()
        assert module.scaling["default"] == config.lora_alpha / (RANK**0.5 if config.use_rslora else RANK)


@pytest.mark.parametrize("stored_rank", [None, 2 * RANK])
def test_a_spans_the_leading_right_singular_vectors(base: nn.Module, stored_rank: int | None, tmp_path: Path) -> None:
    """Of the stored delta, dense or low-rank. The rows are orthogonal, with norm 1/sqrt(3), in the span to 1e-3 for
    these spectra without gaps; the energy seen matches the formula to 1e-5, and exceeds that of a random A."""
    prior = build_prior(
        tmp_path / "expert",
        tmp_path / "base",
        tmp_path / "prior",
        dtype=torch.float32,
        rank=stored_rank,
        overwrite=True,
    )
    fits = init_lora(prior, tmp_path / "base", tmp_path / "adapter", rank=RANK)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, fit in fits.items():
        a = stored[f"base_model.model.{name}.lora_A.weight"].double()
        delta = prior.load(canonical_name(f"{name}.weight")).double()
        torch.testing.assert_close(a @ a.t(), torch.eye(RANK).double() / 3, rtol=0, atol=1e-6)
        _, values, right = torch.linalg.svd(delta, full_matrices=False)
        optimum = float(values[:RANK].square().sum() / values.square().sum())
        projected = delta @ a.t() @ torch.linalg.inv(a @ a.t()) @ a
        seen = float(projected.square().sum() / delta.square().sum())
        assert fit.seen == pytest.approx(seen, rel=1e-5)
        assert seen == pytest.approx(optimum, rel=1e-5)
        assert float(torch.linalg.matrix_norm(3 * a.t() @ a - right[:RANK].t() @ right[:RANK], 2)) < 1e-3
        assert fit.random == RANK / delta.shape[1]
        assert fit.seen > fit.random
        assert fit.delta_norm == pytest.approx(delta.norm().item(), rel=3e-6)


def test_the_command(base: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = (tmp_path / "prior", "--base", tmp_path / "base", "--rank", RANK, "--modules", "attn")
    command = ["init-lora", *map(str, paths), "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    printed = capsys.readouterr().out
    assert main([*command, str(tmp_path / "two"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["kinds"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(found["modules"]) == 12
    q = [fit for name, fit in found["modules"].items() if name.endswith("q_proj")]
    assert len(q) == 3
    seen = sum(fit["seen"] * fit["delta_norm"] ** 2 for fit in q) / sum(fit["delta_norm"] ** 2 for fit in q)
    assert found["kinds"]["q_proj"] == pytest.approx(seen)
    assert f"{seen:.2%}" in next(line for line in printed.splitlines() if line.startswith("q_proj "))
    assert all(f"{fit['seen']:.2%}" in printed for fit in found["modules"].values())
    assert f"12 modules of rank {RANK} capture {found['seen']:.2%} of their deltas' norm^2" in printed
    record = json.loads((tmp_path / "one" / "drift_init_lora.json").read_text())
    assert record["prior"] == Prior.open(tmp_path / "prior").fingerprint
    assert record["modules"] == found["modules"]
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in two)  # the same each time
    assert main([*command, str(tmp_path / "one")]) == 1
    assert "already exists" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "one"), "--overwrite"]) == 0
    assert main([*command, str(tmp_path / "base"), "--overwrite"]) == 1
    assert (tmp_path / "base" / "model.safetensors").exists()


def test_errors_leave_nothing(base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prior, folder, out = tmp_path / "prior", tmp_path / "base", tmp_path / "adapter"
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        init_lora(prior, folder, out, rank=0)
    with pytest.raises(PriorError, match=r"rank 17 is too large for .*k_proj.* of shape"):
        init_lora(prior, folder, out, rank=17)
    with pytest.raises(PriorError, match="no delta for a linear layer of norms"):
        init_lora(prior, folder, out, modules=("norms",))
    with pytest.raises(CheckpointError, match=r"cannot create a transformers model from its config\.json"):
        init_lora(prior, tmp_path / "prior", out)
    other = {name: torch.randn(3, 5) for name in Prior.open(prior).names if "q_proj.weight" in name}
    with pytest.raises(
        PriorMismatchError, match=r"q_proj.weight has shape \[32, 32\], but the prior's .* has shape \[3, 5\]"
    ):
        init_lora(other, folder, out)

    def broken(*arguments: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("drift_kernels.prior.init_lora.write_json", broken)
    with pytest.raises(OSError, match="the disk is full"):
        init_lora(prior, folder, out)
    assert not list(tmp_path.glob("adapter*"))


def test_deltas_of_zeros_have_a_random_a(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))
    model.save_pretrained(tmp_path / "base")
    names = [f"layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
    deltas = {names[0]: torch.zeros(48, 32), names[1]: torch.randn(48, 32)}
    fits = init_lora(deltas, tmp_path / "base", tmp_path / "adapter", rank=RANK)
    assert [fit.seen is None for fit in fits.values()] == [True, False]
    folder, out = tmp_path / "prior", tmp_path / "by-command"
    combine_priors([deltas], folder, weights=[1])
    assert main(["init-lora", str(folder), "--base", str(tmp_path / "base"), "--rank", "8", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " - " in next(line for line in lines if "layers.0.mlp.up_proj" in line)
    loaded(model, tmp_path / "adapter")
