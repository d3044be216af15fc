"""The authors' options of what a prior holds: presets, biases that the expert does not have, no biases."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checkpoints import text_weights, write_checkpoint
from torch import Tensor, nn

from drift_kernels import GradientBias, Prior, build_prior
from drift_kernels.prior.names import PRESETS, select_names, selector

BIASES = [f"layers.{n}.self_attn.q_proj.bias" for n in range(3)]

# The presets as the authors' code has them: regular expressions that are searched in the names of modules.
THEIRS = {
    "mlp": [r"\.mlp\.(gate_proj|up_proj|down_proj)$"],
    "attn": [r"\.self_attn\.(q_proj|k_proj|v_proj|o_proj)$"],
    "norm": [r"\.input_layernorm$", r"\.post_attention_layernorm$"],
    "embed": [r"\.embed_tokens$"],
    "head": [r"lm_head$"],
}
THEIRS["default"] = [*THEIRS["mlp"], *THEIRS["attn"]]
THEIRS["full"] = [*THEIRS["default"], *THEIRS["norm"], *THEIRS["embed"], *THEIRS["head"]]


def without_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.endswith("bias")}


def build(folder: Path, roles: dict[str, dict[str, Tensor]], **options: object) -> Prior:
    for role, weights in roles.items():
        write_checkpoint(folder / role, weights)
    reference = {"reference": folder / "reference"} if "reference" in roles else {}
    return build_prior(folder / "expert", folder / "base", folder / "prior", **reference, **options)


@pytest.mark.parametrize("preset", THEIRS)
def test_presets_are_the_authors(preset: str) -> None:
    """Over the names of a Qwen2 with biases; also where the patterns themselves are asked for."""
    names = [name.removeprefix("model.") for name in text_weights()]
    names += ["lm_head.weight", *(f"layers.{n}.post_attention_layernorm.weight" for n in range(3))]
    names += [f"layers.{n}.self_attn.{norm}.weight" for n in range(3) for norm in ("q_norm", "k_norm")]
    found = [
        name
        for name in names
        if any(re.search(pattern, "model." + name.rpartition(".")[0]) for pattern in THEIRS[preset])
    ]
    assert set(select_names(names, [preset])) == set(found)
    assert set(select_names(names, [f"re:{pattern}" for pattern in THEIRS[preset]])) == set(found)
    assert found


def test_norms_are_all_norms() -> None:
    names = ["norm.weight", *(f"layers.0.{name}.weight" for name in ("input_layernorm", "self_attn.q_norm"))]
    assert len(select_names(names, ["norms"])) == 3
    assert select_names(names, ["norm"]) == ["layers.0.input_layernorm.weight"]
    assert set(THEIRS) <= set(PRESETS)


def test_a_pattern_that_speaks_of_parameters_is_searched_in_their_names_alone() -> None:
    assert not selector(r"re:^(?!.*bias).*$")("layers.0.self_attn.q_proj.bias")
    assert selector(r"re:q_proj\.weight$")("layers.0.self_attn.q_proj.weight")
    assert not selector(r"re:q_proj$")("layers.0.self_attn.q_proj.lora_A.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_bias_that_only_the_base_has_is_pulled_to_zero(
    tmp_path: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    base = text_weights()
    prior = build(tmp_path, {"expert": without_biases(text_weights()), "base": base}, dtype=dtype, modules=["attn"])
    for name in BIASES:
        bias = base[f"model.{name}"]
        tolerance = 0 if dtype == torch.float32 else 1 / 127
        torch.testing.assert_close(
            prior.load(name).float(), -bias, rtol=tolerance, atol=tolerance * float(bias.abs().max())
        )
        assert prior.info(name).param_norm == pytest.approx(float(bias.double().norm()), rel=1e-6)
        assert prior.info(name).cosine is None
    assert prior.record["pulled_to_zero"] == BIASES
    said = f"3 biases missing from the expert are pulled to zero: {', '.join(BIASES)}"
    assert said in prior.record["warnings"]
    assert said in caplog.text
    assert "counterpart" not in caplog.text


def test_it_moves_the_bias_to_zero(tmp_path: Path) -> None:
    base = text_weights()
    prior = build(tmp_path, {"expert": without_biases(text_weights()), "base": base}, dtype=torch.float32)
    params = {name: nn.Parameter(tensor.clone()) for name, tensor in base.items()}
    for p in params.values():
        p.grad = torch.zeros_like(p)
    GradientBias(params.items(), prior, prior_scaling="absolute").apply_()
    for name in BIASES:
        assert torch.equal(params[f"model.{name}"].grad, base[f"model.{name}"])


@pytest.mark.parametrize("lacking", [("expert",), ("reference",), ("expert", "reference")])
def test_with_a_reference(tmp_path: Path, lacking: tuple[str, ...]) -> None:
    """expert - reference, either of which may be without; where both are, there is nothing to subtract."""
    roles = {role: text_weights() for role in ("expert", "base", "reference")}
    zero = {name: torch.zeros(33) for name in BIASES}
    biases = {role: zero if role in lacking else {n: roles[role][f"model.{n}"] for n in BIASES} for role in roles}
    roles |= {role: without_biases(roles[role]) for role in lacking}
    prior = build(tmp_path, roles, dtype=torch.float32)
    for name in BIASES:
        if len(lacking) == 2:
            assert name not in prior.names
        else:
            assert torch.equal(prior.load(name), biases["expert"][name] - biases["reference"][name])
    assert prior.record["pulled_to_zero"] == (BIASES if lacking == ("expert",) else [])


def test_a_bias_of_a_module_that_the_expert_does_not_have_is_left_out(tmp_path: Path) -> None:
    """Its weight is missing too: nothing is known of what the expert computes there."""
    expert = {name: tensor for name, tensor in text_weights().items() if "layers.1.self_attn.q_proj" not in name}
    prior = build(tmp_path, {"expert": expert, "base": text_weights()})
    assert "layers.1.self_attn.q_proj.bias" not in prior.names
    assert prior.record["pulled_to_zero"] == []
    assert any("2 tensors of the base have no counterpart" in warning for warning in prior.record["warnings"])


def test_without_biases(tmp_path: Path) -> None:
    prior = build(tmp_path, {"expert": text_weights(), "base": text_weights()}, include_bias=False)
    assert not any(name.endswith(".bias") for name in prior.names)
    assert len(prior) == 3 * 7
    assert prior.record["include_bias"] is False
    assert Prior.open(tmp_path / "prior").record["include_bias"] is False
    assert "counterpart" not in " ".join(prior.record["warnings"])
