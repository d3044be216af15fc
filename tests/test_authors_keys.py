"""The keys of the authors' fork: what they bias, and by how much, follows the fork's rules."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import text_weights, tuned, write_checkpoint
from torch import Tensor, nn

from drift_kernels import GradientBias
from drift_kernels.errors import CheckpointError, PriorError
from drift_kernels.integrations.authors_keys import AuthorsSettings
from drift_kernels.prior import Prior

# The fork's presets, searched for in module names.
MLP, ATTN = r"\.mlp\.(gate_proj|up_proj|down_proj)$", r"\.self_attn\.(q_proj|k_proj|v_proj|o_proj)$"
NORM, EMBED = r"\.(input_layernorm|post_attention_layernorm)$", r"\.embed_tokens$"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    base = text_weights()
    weights = {"base": base, "expert": tuned(base), "other": tuned(base)}
    return {name: (write_checkpoint(folder / name, tensors), tensors) for name, tensors in weights.items()}


def gradients(checkpoints: Any, tmp_path: Path, **keys: Any) -> dict[str, Tensor]:
    """The gradients after biasing zeros."""
    settings = AuthorsSettings.of({f"delta_prior{key}": value for key, value in keys.items()})
    folder = settings.prior(str(checkpoints["base"][0]), tmp_path / "prior")
    params = {name: nn.Parameter(weight.clone()) for name, weight in checkpoints["base"][1].items()}
    for param in params.values():
        param.grad = torch.zeros_like(param)
    GradientBias(params.items(), **settings.options(Prior.open(folder))).apply_()
    return {name: param.grad for name, param in params.items()}


def check(found: dict[str, Tensor], delta: dict[str, Tensor], alphas: dict[str, float], normalize: Any = None) -> None:
    """Check that each gradient is -alpha*delta in bfloat16; `alphas` has the alpha of the pattern that a name
    matches."""
    assert set(found) == set(delta)
    for name, grad in found.items():
        module = re.sub(r"\.(weight|bias)$", "", f".{name}")
        alpha = next((alpha for pattern, alpha in alphas.items() if re.search(pattern, module)), 0.0)
        if alpha == 0.0:
            assert not grad.any(), name
        else:
            scale = 1.0 if normalize is None else normalize[name].norm() / delta[name].norm()
            torch.testing.assert_close(grad, -alpha * scale * delta[name], rtol=0.01, atol=1e-6)


def difference(checkpoints: Any, one: str, other: str) -> dict[str, Tensor]:
    (_, minuend), (_, subtrahend) = checkpoints[one], checkpoints[other]
    return {name: minuend[name] - subtrahend[name] for name in minuend}


PLAIN = {"_scale": "absolute", "_normalize_delta_to_param": False}


@pytest.mark.parametrize(
    ("keys", "alphas"),
    [
        ({}, {MLP: 1, ATTN: 1}),
        ({"_alpha": 0.3}, {MLP: 0.3, ATTN: 0.3}),
        ({"_merge_patterns": "attn"}, {ATTN: 1}),
        ({"_merge_patterns": "attn, norm"}, {ATTN: 1, NORM: 1}),
        ({"_merge_patterns": ["mlp", "embed"], "_alpha": "0.5"}, {MLP: 0.5, EMBED: 0.5}),
        ({"_merge_patterns": '["default"]'}, {MLP: 1, ATTN: 1}),
        ({"_merge_patterns": r"re:\.self_attn\.(q|k)_proj$"}, {r"\.(q|k)_proj$": 1}),
        ({"_merge_patterns": r"layers\.1\.mlp\.\w{2,4}_proj$"}, {r"layers\.1\.mlp\.\w{2,4}_proj$": 1}),
        ({"_merge_patterns": {"attn": 2.0, "mlp": 0.5}}, {ATTN: 2.0, MLP: 0.5}),
        ({"_merge_patterns": json.dumps({r"re:\.0\.mlp\.": 0.1, "mlp": 1, "attn": 0})}, {r"\.0\.mlp": 0.1, MLP: 1}),
        ({"_only_layers": "0,2"}, {r"\.1\.": 0, MLP: 1, ATTN: 1}),
        ({"_only_layers": [1], "_merge_patterns": "attn,embed"}, {r"\.[02]\.": 0, ATTN: 1, EMBED: 1}),
        ({"_only_layers": 2}, {r"\.[01]\.": 0, MLP: 1, ATTN: 1}),
        ({"_skip_first_n": 2}, {r"\.[01]\.": 0, MLP: 1, ATTN: 1}),
        ({"_skip_first_n": 1, "_only_layers": "0,1", "_alpha": 3}, {r"\.[02]\.": 0, MLP: 3, ATTN: 3}),
    ],
)
def test_modules_layers_and_alphas(checkpoints: Any, tmp_path: Path, keys: Any, alphas: Any) -> None:
    found = gradients(checkpoints, tmp_path, **{"1_ckpt": checkpoints["expert"][0], **PLAIN, **keys})
    check(found, difference(checkpoints, "expert", "base"), alphas)


def test_biases_are_left_out_when_asked(checkpoints: Any, tmp_path: Path) -> None:
    keys = {"1_ckpt": checkpoints["expert"][0], **PLAIN, "_include_bias": False}
    found = gradients(checkpoints, tmp_path, **keys)
    biases = {name for name in found if name.endswith(".bias")}
    assert len(biases) == 3
    assert all(not found.pop(name).any() for name in biases)
    delta = difference(checkpoints, "expert", "base")
    check(found, {name: delta[name] for name in found}, {MLP: 1, ATTN: 1})


def test_two_priors_are_the_second_minus_the_first(checkpoints: Any, tmp_path: Path) -> None:
    keys = {"1_ckpt": checkpoints["expert"][0], "2_ckpt": checkpoints["other"][0]}
    check(
        gradients(checkpoints, tmp_path, **keys, **PLAIN), difference(checkpoints, "other", "expert"), {MLP: 1, ATTN: 1}
    )


def test_deltas_are_normalised_to_the_weights_by_default(checkpoints: Any, tmp_path: Path) -> None:
    keys = {"1_ckpt": checkpoints["expert"][0], "_scale": "absolute"}
    delta = difference(checkpoints, "expert", "base")
    check(gradients(checkpoints, tmp_path, **keys), delta, {MLP: 1, ATTN: 1}, normalize=checkpoints["base"][1])


def test_the_default_is_what_the_fork_runs_with(checkpoints: Any, tmp_path: Path) -> None:
    settings = AuthorsSettings.of({"delta_prior1_ckpt": checkpoints["expert"][0]})
    prior = Prior.open(settings.prior(str(checkpoints["base"][0]), tmp_path / "prior"))
    expected = {"prior": prior, "alpha": 1.0, "prior_scaling": "adaptive_cosine", "normalize_to_param": False}
    assert settings.options(prior) == expected


def test_a_prior_that_was_built_is_taken_again_if_it_is_the_same(checkpoints: Any, tmp_path: Path) -> None:
    base, expert, other = (str(checkpoints[name][0]) for name in ("base", "expert", "other"))
    settings, folder = AuthorsSettings.of({"delta_prior1_ckpt": expert}), tmp_path / "prior"
    with pytest.raises(PriorError, match="was not built"):
        settings.prior(base, folder, may_build=False)
    settings.prior(base, folder)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert AuthorsSettings.of({"delta_prior1_ckpt": expert, "delta_prior_alpha": 2}).prior(base, folder) == folder
    assert settings.prior(base, folder, may_build=False) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    for keys in ({"1_ckpt": other}, {"1_ckpt": expert, "2_ckpt": other}, {"1_ckpt": expert, "_merge_patterns": "attn"}):
        changed = AuthorsSettings.of({f"delta_prior{key}": value for key, value in keys.items()})
        with pytest.raises(PriorError, match="was built from other"):
            changed.prior(base, folder)
    os.utime(Path(expert) / "model.safetensors", ns=(0, 0))
    with pytest.raises(PriorError, match="was built from other"):
        settings.prior(base, folder)


EXPERT = {"1_ckpt": "{expert}"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "either delta_prior_path (the folder of a prior) or delta_prior1_ckpt"),
        ({**EXPERT, "_path": "prior"}, "either delta_prior_path"),
        ({"2_ckpt": "{expert}", "_path": "prior"}, "delta_prior1_ckpt: set delta_prior1_ckpt too"),
        ({**EXPERT, "_strength": 1}, "delta_prior_strength; expected keys among delta_prior_path, delta_prior1_ckpt"),
        ({**EXPERT, "_scale": "decoupled"}, "delta_prior_scale must be one of absolute, gradnorm, adaptive_cosine"),
        ({**EXPERT, "_alpha": 1, "_merge_patterns": {"attn": 2}}, "alpha is set twice"),
        ({**EXPERT, "_alpha": "strong"}, "delta_prior_alpha must be a number"),
        ({**EXPERT, "_merge_patterns": {"attn": 0}}, "selects nothing"),
        ({**EXPERT, "_merge_patterns": "re:("}, "not a valid regular expression"),
        ({**EXPERT, "_merge_patterns": 3}, "must be patterns"),
        ({**EXPERT, "_include_bias": "no"}, "delta_prior_include_bias must be true or false"),
        ({**EXPERT, "_only_layers": "first"}, "layers must be numbers"),
    ],
)
def test_what_means_nothing_is_refused_at_once(checkpoints: Any, keys: Any, message: str) -> None:
    given = {f"delta_prior{key}": value for key, value in keys.items()}
    given = {key: str(checkpoints["expert"][0]) if value == "{expert}" else value for key, value in given.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        AuthorsSettings.of(given)


def test_what_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"delta_prior_path: .*nowhere"):
        AuthorsSettings.of({"delta_prior_path": str(tmp_path / "nowhere")})
    with pytest.raises(CheckpointError, match="nowhere"):
        AuthorsSettings.of({"delta_prior1_ckpt": str(tmp_path / "nowhere")})


def test_layers_and_patterns_that_the_prior_has_not_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    expert = checkpoints["expert"][0]
    with pytest.raises(ValueError, match="the prior has no layer 3; it has 0 to 2"):
        gradients(checkpoints, tmp_path, **{"1_ckpt": expert, "_only_layers": "2-3"})
    with pytest.raises(ValueError, match="no delta of the prior matches norm"):
        gradients(checkpoints, tmp_path, **{"_path": tmp_path / "prior", "_merge_patterns": "attn,norm"})
