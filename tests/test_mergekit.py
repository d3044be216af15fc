"""`combine` and `apply`, compared with mergekit on the same checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

from drift_kernels import apply_prior, build_prior, combine_priors

pytest.importorskip("mergekit", reason="pip install 'drift_kernels[mergekit]'")

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

CONFIG = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
EXPERTS, WEIGHTS = "abc", (0.7, 0.3, 1.5)
# The difference of float32 weights, its products and sums, and the last sum are rounded in different orders: the error
# is a few units of the largest number involved.
UNITS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, experts, and their priors in float32."""
    folder = tmp_path_factory.mktemp("mergekit")
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG))
    for param in base.parameters():
        param.data.normal_(std=0.5)
    base.save_pretrained(folder / "base")
    for name in EXPERTS:
        expert = copy.deepcopy(base)
        for param in expert.parameters():
            param.data += 0.01 * torch.randn_like(param)
        expert.save_pretrained(folder / name)
        place = folder / f"prior-{name}"
        build_prior(
            folder / name,
            folder / "base",
            place,
            modules=("attn", "mlp", "norms", "embed", "head"),
            dtype=torch.float32,
        )
    return folder


def loaded(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def theirs(
    folder: Path,
    out: Path,
    method: str,
    weights: Sequence[float],
    densities: Sequence[float] = (),
    **parameters: object,
) -> dict[str, Tensor]:
    models = [
        {
            "model": str(folder / name),
            "parameters": {"weight": weight} | ({"density": densities[i]} if densities else {}),
        }
        for i, (name, weight) in enumerate(zip(EXPERTS, weights, strict=False))
    ]
    config = {"merge_method": method, "models": models, "parameters": parameters, "dtype": "float32"}
    config |= {} if method == "linear" else {"base_model": str(folder / "base")}
    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False, random_seed=1)
    run_merge(MergeConfiguration.model_validate(config), str(out), options)
    return loaded(out)


def ours(folder: Path, out: Path, method: str, weights: Sequence[float], **options: object) -> dict[str, Tensor]:
    priors = [folder / f"prior-{name}" for name in EXPERTS[: len(weights)]]
    prior = combine_priors(priors, out / "prior", weights=weights, method=method, dtype=torch.float32, **options)
    apply_prior(prior, folder / "base", out / "merged")
    return loaded(out / "merged")


def at_the_bound(delta: Tensor, density: float) -> Tensor:
    """Elements whose magnitude equals the smallest that TIES keeps: we keep all of them, mergekit some."""
    magnitudes = delta.abs()
    least = magnitudes.flatten().sort(descending=True).values[int(density * delta.numel()) - 1]
    equal = magnitudes == least
    return equal if equal.sum() > 1 else torch.zeros_like(equal)


def check(
    folder: Path,
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    gain: float = 1,
    densities: Sequence[float] = (),
) -> None:
    """Check equality to `UNITS` float32 units of |W| + gain * the sum of |w * delta|. Prints the largest error."""
    base = loaded(folder / "base")
    experts = [loaded(folder / name) for name in EXPERTS]
    assert found.keys() == expected.keys() == base.keys()
    worst = 0.0
    for name, weight in base.items():
        deltas = [expert[name] - weight for expert in experts]
        size = weight.abs() + gain * sum(w * delta.abs() for w, delta in zip(WEIGHTS, deltas, strict=True))
        error = (found[name].double() - expected[name].double()).abs()
        for delta, density in zip(deltas, densities, strict=False):
            error[at_the_bound(delta, density)] = 0
        units = (error / (size * torch.finfo(torch.float32).eps)).max().item()
        assert units <= UNITS, name
        assert not torch.equal(found[name], weight)
        worst = max(worst, units)
    print(f"largest difference: {worst:.2f} units of float32")


@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic(folder: Path, tmp_path: Path, normalize: bool) -> None:
    expected = theirs(folder, tmp_path / "theirs", "task_arithmetic", WEIGHTS, normalize=normalize)
    check(folder, ours(folder, tmp_path, "linear", WEIGHTS, normalize=normalize), expected)


def test_an_average_of_models(folder: Path, tmp_path: Path) -> None:
    """mergekit's `linear` averages the models themselves, and by default divides by the sum of the weights."""
    expected = theirs(folder, tmp_path / "theirs", "linear", WEIGHTS)
    check(folder, ours(folder, tmp_path, "linear", WEIGHTS, normalize=True), expected)


@pytest.mark.parametrize("normalize", [None, False])
@pytest.mark.parametrize("densities", [(1.0, 1.0, 1.0), (0.3, 0.3, 0.3), (0.5, 0.9, 0.05)])
def test_ties(folder: Path, tmp_path: Path, densities: tuple[float, ...], normalize: bool | None) -> None:
    parameters = {} if normalize is None else {"normalize": normalize}
    expected = theirs(folder, tmp_path / "theirs", "ties", WEIGHTS, densities, **parameters)
    found = ours(folder, tmp_path, "ties", WEIGHTS, density=densities, normalize=normalize)
    check(folder, found, expected, 1 / min(WEIGHTS), densities)


@pytest.mark.parametrize(("method", "name"), [("dare", "dare_linear"), ("dare_ties", "dare_ties")])
def test_dare_that_keeps_all(folder: Path, tmp_path: Path, method: str, name: str) -> None:
    expected = theirs(folder, tmp_path / "theirs", name, WEIGHTS, (1.0, 1.0, 1.0))
    check(folder, ours(folder, tmp_path, method, WEIGHTS, density=1.0), expected)


def test_dare_of_one(folder: Path, tmp_path: Path) -> None:
    """Elements are dropped equally often, and the others scaled equally: here by 1/density, as in the paper; in
    mergekit so that the sum of magnitudes is kept. The share to 7 standard deviations, since many are compared."""
    base, expert, density = loaded(folder / "base"), loaded(folder / "a"), 0.3
    both = [
        theirs(folder, tmp_path / "theirs", "dare_linear", [1.0], [density]),
        ours(folder, tmp_path, "dare", [1.0], density=density),
    ]
    for name, weight in base.items():
        delta = (expert[name] - weight).double()
        clear = delta.abs() > 1e-3  # the last sum leaves too few digits of smaller ones
        for which, merged in enumerate(both):
            added = (merged[name] - weight).double()
            kept = (added != 0) & clear
            n = int(clear.sum())
            assert abs(kept.sum().item() / n - density) < 7 * math.sqrt(density * (1 - density) / n)
            ratio = (added[kept] / delta[kept]).median().item()
            sums = (delta.abs().sum() / delta[added != 0].abs().sum()).item()
            assert ratio == pytest.approx(sums if which == 0 else 1 / density, rel=1e-3)
