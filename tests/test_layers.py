"""How many layers a checkpoint has: those for multi-token prediction behind the last one do not count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import text_weights, write_checkpoint
from torch import Tensor

from drift_kernels import Prior, PriorError, build_prior
from drift_kernels.prior.names import layer_of

FURTHER = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}  # GLM-4.5, DeepSeek-V3
PROJECTION = {"model.layers.3.eh_proj.weight": torch.randn(31, 62), "model.layers.3.enorm.weight": torch.randn(31)}


def build(
    folder: Path,
    *,
    expert: tuple[dict[str, Tensor], dict[str, object]] | None = None,
    base: tuple[dict[str, Tensor], dict[str, object]] | None = None,
    **options: object,
) -> Prior:
    for role, given in (("expert", expert), ("base", base)):
        weights, config = given or (text_weights(prefix="model.language_model."), {})
        write_checkpoint(folder / role, weights, config=config)
    return build_prior(folder / "expert", folder / "base", folder / "prior", **options)


def layers_of(prior: Prior) -> set[int | None]:
    return {layer_of(name) for name in prior.names}


@pytest.mark.parametrize(
    "config",
    [
        FURTHER,
        {"text_config": FURTHER},
        {"num_hidden_layers": 9, "text_config": FURTHER},
        {"llm_config": FURTHER},
        {"language_config": FURTHER},
        {"thinker_config": {"num_hidden_layers": 9, "text_config": FURTHER}, "num_hidden_layers": 9},
    ],
    ids=["flat", "nested", "nested under another", "InternVL", "DeepSeek-VL2", "Qwen-Omni"],
)
@pytest.mark.parametrize("role", ["expert", "base"])
def test_the_config_counts_them(tmp_path: Path, role: str, config: dict[str, object]) -> None:
    prior = build(tmp_path, **{role: (text_weights(layers=4), config)})
    assert layers_of(prior) == {0, 1, 2}
    assert not [
        warning for warning in prior.record["warnings"] if "fine-tuned from this base" not in warning
    ]  # they are not


@pytest.mark.parametrize("role", ["expert", "base"])
def test_their_projection_tells_them_without_a_config(tmp_path: Path, role: str) -> None:
    prior = build(tmp_path, **{role: (text_weights(layers=4) | PROJECTION, {})})
    assert layers_of(prior) == {0, 1, 2}


def test_those_of_both_are_left_out_too(tmp_path: Path) -> None:
    """transformers loads neither, so that no delta of them would ever be bound."""
    prior = build(tmp_path, expert=(text_weights(layers=4), FURTHER), base=(text_weights(layers=4), FURTHER))
    assert layers_of(prior) == {0, 1, 2}


def test_those_with_a_name_of_their_own_never_counted(tmp_path: Path) -> None:
    """Qwen3-Next keeps them under mtp."""
    further = {name.replace("model.", "mtp."): t for name, t in text_weights(layers=1).items() if "layers" in name}
    assert layers_of(build(tmp_path, expert=(text_weights() | further, {}))) == {0, 1, 2}


@pytest.mark.parametrize("role", ["expert", "base"])
def test_layers_may_choose_those_in_common(tmp_path: Path, role: str) -> None:
    """Where nothing tells what the further layer is for."""
    deeper = {role: (text_weights(layers=4), {})}
    with pytest.raises(PriorError, match=r"has [34] layers, .* has [34]; choose layers \(--layers\) from 0-2"):
        build(tmp_path, **deeper)
    paths = (tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    assert layers_of(build_prior(*paths, layers=[0, 2])) == {0, 2}
    with pytest.raises(PriorError, match=r"choose layers \(--layers\) from 0-2"):
        build_prior(*paths, layers=[2, 3], overwrite=True)


def test_a_config_without_further_layers_changes_nothing(tmp_path: Path) -> None:
    """Its count of layers may be another model's."""
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}
    assert layers_of(build(tmp_path, expert=(text_weights(), config))) == {0, 1, 2}
