"""Deltas in torchtitan's names and layouts: what it holds of the expert, less what it holds of the base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan")

# isort: off
from examples import torchtitan_llama3 as example  # before the rest of torchtitan: it brings the CPU

# isort: on
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torchtitan.models.common import CosSinRoPE
from torchtitan.models.llama3 import Llama3StateDictAdapter
from torchtitan.models.qwen3 import _build_qwen3_layers, _build_qwen3_moe_layers
from torchtitan.models.qwen3 import model_registry as qwen3_registry
from torchtitan.protocols.model_spec import ModelSpec

from drift_kernels import FusedDriftAdamW, PriorError, build_prior
from drift_kernels.errors import PriorMismatchError
from drift_kernels.integrations.torchtitan import titan_prior
from examples import tiny


@pytest.fixture(scope="module", autouse=True)
def _files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The example's files, in the working directory of all tests."""
    tiny.quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("titan"))
        example.write_files()
        yield


def llama(fuse_qkv: bool = True) -> tuple[ModelSpec, nn.Module]:
    return example.model_spec(fuse_qkv), example.new_llama()


def qwen3(moe: bool = False) -> tuple[ModelSpec, nn.Module]:
    """Of two layers; dense with tied embeddings, as torchtitan's flavor."""
    spec = qwen3_registry("debugmodel_moe" if moe else "debugmodel")
    dims = {"n_layers": 2, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "attn_backend": "flex"}
    rope = CosSinRoPE.Config(dim=8, max_seq_len=64)
    sizes = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": not moe,
    }
    if not moe:
        spec.model.layers = _build_qwen3_layers(**dims, hidden_dim=96, rope=rope)
        return spec, transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, intermediate_size=96))
    experts = {"moe_hidden_dim": 24, "num_experts": 4, "top_k": 2, "moe_comm_backend": "standard"}
    spec.model.layers = _build_qwen3_moe_layers(**dims, **experts, rope=rope)
    config = transformers.Qwen3MoeConfig(
        **sizes, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
    )
    return spec, transformers.Qwen3MoeForCausalLM(config)


def saved(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """A checkpoint of HF's form; its tensors."""
    model.save_pretrained(folder)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def in_titan(spec: ModelSpec, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of torchtitan's model, loaded from a checkpoint as torchtitan does it."""
    model = spec.model.build()
    missing, _ = model.load_state_dict(spec.state_dict_adapter(spec.model, None).from_hf(stored), strict=False)
    assert not [name for name in missing if name in dict(model.named_parameters())]
    return {name: param.detach() for name, param in model.named_parameters()}


MODELS = {
    "llama, joined": lambda: llama(),
    "llama, apart": lambda: llama(fuse_qkv=False),
    "qwen3": lambda: qwen3(),
    "qwen3 moe": lambda: qwen3(moe=True),
}


@pytest.mark.parametrize("which", MODELS)
def test_deltas_fit_torchtitans_parameters_element_for_element(which: str, tmp_path: Path) -> None:
    spec, model = MODELS[which]()
    base = saved(model, tmp_path / "base")
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.01 * torch.randn_like(param))
    expert = saved(model, tmp_path / "expert")
    build_prior(
        tmp_path / "expert",
        tmp_path / "base",
        tmp_path / "prior",
        modules=["full", "norms", "re:gate"],
        dtype=torch.float32,
    )
    prior = titan_prior(spec, tmp_path / "prior")
    ours, theirs = in_titan(spec, base), in_titan(spec, expert)
    coverage = prior.coverage(ours.items())
    assert coverage.complete
    assert set(coverage.matched) == set(ours), coverage.summary()
    for name, source in coverage.sources.items():
        expected = theirs[name] - ours[name]
        delta = prior.load_stored(source)
        assert torch.equal(delta, expected), name
        assert prior.info(source).delta_norm == pytest.approx(float(expected.double().norm()), rel=1e-6)
        box = tuple(slice(size // 3, size) for size in delta.shape)
        assert torch.equal(prior.load_stored(source, box=box), delta[box]), name


def test_names_alone_would_not_do(tmp_path: Path) -> None:
    prior = titan_prior(example.model_spec(fuse_qkv=False), "prior")
    stored = prior.load("layers.0.self_attn.q_proj.weight")
    source = prior.coverage([("layers.0.attention.qkv_linear.wq.weight", stored)]).sources.popitem()[1]
    delta = prior.load_stored(source)
    assert not torch.equal(delta, stored)
    assert sorted(delta.tolist()) == sorted(stored.tolist())


def test_parts_of_a_joined_weight_that_are_missing(tmp_path: Path) -> None:
    build_prior("expert", "base", tmp_path / "prior", modules=["re:q_proj", "re:o_proj"], dtype=torch.float32)
    coverage = titan_prior(example.model_spec(), tmp_path / "prior").coverage(parameters())
    assert sorted(coverage.matched) == [f"layers.{i}.attention.wo.weight" for i in (0, 1)]
    assert coverage.prior_only == [f"layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]


def test_a_prior_of_another_model_is_refused() -> None:
    wide = {
        f"layers.0.self_attn.{name}.weight": torch.ones(48, size) for name, size in (("q_proj", 50), ("o_proj", 48))
    }
    with pytest.raises(PriorMismatchError, match=r"q_proj.weight' has shape \(48, 48\).*\(48, 50\)"):
        FusedDriftAdamW(parameters(), prior=titan_prior(example.model_spec(), wide))


def test_a_conversion_that_changes_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(self: Any, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor + 1 for name, tensor in convert(self, stored).items()}

    convert = Llama3StateDictAdapter.from_hf
    monkeypatch.setattr(Llama3StateDictAdapter, "from_hf", shifted)
    prior = titan_prior(example.model_spec(), "prior")
    with pytest.raises(PriorError, match="changes values, not only their positions"):
        prior.load_stored(prior.coverage(parameters()).sources["layers.0.attention.wo.weight"])


def parameters() -> list[tuple[str, nn.Parameter]]:
    return list(example.model_spec().model.build().named_parameters())
