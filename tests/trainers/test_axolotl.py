"""axolotl's entry point with the plugin: the bias acts, in full, LoRA and QLoRA training; nothing trains without it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("axolotl")

from examples import axolotl_yaml as example, tiny  # isort: skip  # first: it sets the environment

import documents
import ranks
import torch
import torch.distributed as dist
import yaml
from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.utils import DistributedType
from axolotl.integrations.base import BasePlugin, PluginManager
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer

from drift_kernels import FusedDriftAdamW, PriorError, build_prior
from drift_kernels.integrations import unwrap_optimizer
from drift_kernels.integrations.axolotl import PLUGIN, DriftPlugin
from drift_kernels.integrations.transformers import use_drift

HALF = tiny.STEPS // 2
LORA = {
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "lora_mlp_kernel": False,  # otherwise axolotl uses its Triton kernels, which need CUDA
    "learning_rate": 1e-2,
    "max_steps": HALF,
}
# For adapters: a pull that ends at the expert.
ANCHORED = {"alpha": 2.0, "prior_scaling": "gradnorm", "anchor": True, "anneal": None}


class Witness(BasePlugin):
    """Gives the tests access to the Trainer."""

    trainer: Trainer

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        Witness.trainer = trainer


class Plain(BasePlugin):
    """Trains with FusedDriftAdamW without a prior, which `drift:` rejects."""

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        use_drift(trainer, prior=None)


class Replacing(BasePlugin):
    """Another plugin with its own optimizer."""

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        trainer.optimizer_cls_and_kwargs = torch.optim.AdamW, {"lr": cfg.learning_rate}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny.quiet()
    folder = tmp_path_factory.mktemp("axolotl")
    example.write_files(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_plugins_of_other_tests() -> None:
    """Remove other tests' plugins, which axolotl keeps for the whole process."""
    PluginManager.get_instance().plugins.clear()


def drift(folder: Path, *further_plugins: type[BasePlugin], **settings: Any) -> dict[str, Any]:
    entries = example.drift(folder, **settings)
    entries["plugins"] += [f"{plugin.__module__}.{plugin.__qualname__}" for plugin in further_plugins]
    return entries


def log(folder: Path, out: str, step: int = tiny.STEPS) -> list[dict[str, float]]:
    state = json.loads((folder / out / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def adapted(folder: Path, out: str) -> nn.Module:
    return PeftModel.from_pretrained(tiny.base_model(), folder / out)


@pytest.fixture(scope="module")
def without(folder: Path) -> nn.Module:
    return example.train(folder, "without")


@pytest.fixture(scope="module")
def biased(folder: Path) -> tuple[nn.Module, FusedDriftAdamW]:
    PluginManager.get_instance().plugins.clear()
    return example.train(folder, "biased", **drift(folder, Witness)), unwrap_optimizer(Witness.trainer.optimizer)


def along_delta(model: nn.Module) -> float:
    """cos(trained - base, expert - base), over all parameters in the prior."""
    base, trained = (dict(m.named_parameters()) for m in (tiny.base_model(), model))
    deltas = tiny.expert_prior()
    moved, delta = (
        torch.cat([tensors[name].detach().flatten() for name in deltas])
        for tensors in ({name: trained[name] - base[name] for name in deltas}, deltas)
    )
    return float(torch.cosine_similarity(moved, delta, dim=0))


# In full


def test_the_prior_acts(without: nn.Module, biased: tuple[nn.Module, FusedDriftAdamW]) -> None:
    model, optimizer = biased
    assert set(optimizer.prior_names) == set(optimizer.biased_names) == set(tiny.expert_prior())
    assert tiny.held_out_loss(model) < 0.4 * tiny.held_out_loss(without)
    assert along_delta(model) > 2 * along_delta(without)


def test_what_axolotl_says_is_taken(biased: tuple[nn.Module, FusedDriftAdamW]) -> None:
    _, optimizer = biased
    assert optimizer.defaults["lr"] == tiny.LR
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert optimizer.max_grad_norm == 1.0
    assert Witness.trainer.args.max_grad_norm == 0


def test_the_figures_are_logged(folder: Path, biased: Any) -> None:
    entries = log(folder, "biased")
    assert [entry["prior/biased"] for entry in entries[:-1]] == [len(tiny.expert_prior())] * (len(entries) - 1)
    assert all(entry["prior/cosine/attn"] and entry["prior/ratio/mlp"] for entry in entries)
    assert [entry["prior/alpha"] for entry in entries] == pytest.approx([1.5, 1.0, 0.5, 0.0])  # `anneal`


def test_it_resumes_bit_for_bit(folder: Path, biased: tuple[nn.Module, FusedDriftAdamW]) -> None:
    halfway = folder / "biased" / f"checkpoint-{HALF}"
    resumed = example.train(folder, "resumed", **drift(folder), resume_from_checkpoint=str(halfway))
    assert tiny.same(resumed, biased[0])


def test_without_strength_it_is_plain_fused_drift_adamw(folder: Path) -> None:
    short = {"max_steps": 6, "save_steps": 6}
    plain = {"plugins": [f"{Plain.__module__}.Plain"]}
    model = example.train(folder, "plain", **short, **plain)
    PluginManager.get_instance().plugins.clear()
    assert tiny.same(model, example.train(folder, "alpha-0", **short, **drift(folder, alpha=0.0)))


# Adapters


@pytest.mark.parametrize("adapter", [{}, {"adapter": "qlora", "load_in_4bit": True}], ids=["lora", "qlora"])
def test_the_prior_acts_on_adapters(folder: Path, adapter: dict[str, Any]) -> None:
    run = {**LORA, **adapter}
    plain, out = f"{run['adapter']}-without", run["adapter"]
    example.run(folder, plain, **run)
    example.run(folder, out, **run, **drift(folder, Witness, **ANCHORED))
    names: list[str] = unwrap_optimizer(Witness.trainer.optimizer).biased_names
    weights = [name.removesuffix(".weight") for name in tiny.expert_prior() if name.endswith("_proj.weight")]
    assert sorted(names) == sorted(
        f"base_model.model.{name}.lora_{factor}.default.weight" for name in weights for factor in "AB"
    )
    assert tiny.held_out_loss(adapted(folder, out)) < 0.5 * tiny.held_out_loss(adapted(folder, plain))


# Two processes


class TwoOnCpu(BasePlugin):
    """Works around axolotl, and Accelerate when sharding, assuming that each of several processes has a GPU."""

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        cfg.device_map = "cpu"

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        if cfg.fsdp_config:
            trainer.accelerator.state.distributed_type = DistributedType.FSDP
            trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # as axolotl's environment says
            trainer.is_fsdp_enabled = True

    def post_train(self, cfg: Any, model: nn.Module) -> None:
        raise SystemExit  # next it would save, which needs GPUs for a sharded model


def in_a_rank(folder: Path, out: str, run: dict[str, Any]) -> dict[str, Any]:
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    build = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, device: build(self, "cpu")
    tiny.quiet()
    with pytest.raises(SystemExit):
        example.run(folder, out, **run)
    params = {name.removeprefix("module."): p.detach() for name, p in Witness.trainer.model_wrapped.named_parameters()}
    return {
        "sharded": all(isinstance(p, DTensor) for p in params.values()),
        "params": {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in params.items()},
        "names": sorted(unwrap_optimizer(Witness.trainer.optimizer).biased_names),
    }


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Tensor]:
    """The parameters after the same steps in one process."""
    example.run(folder, "alone", **SHORT, **drift(folder, Witness))
    return {name: param.detach() for name, param in Witness.trainer.model.named_parameters()}


# adam_epsilon is above gradients' rounding errors: otherwise Adam turns these into full steps where gradients vanish.
SHORT = {"max_steps": 4, "save_steps": None, "save_strategy": "no", "adam_epsilon": 1e-4}
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "Qwen2DecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
    },
}


@pytest.mark.parametrize("sharding", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(
    folder: Path, tmp_path: Path, alone: dict[str, Tensor], sharding: dict[str, Any]
) -> None:
    run = {**SHORT, **sharding, **drift(folder, Witness, TwoOnCpu), "micro_batch_size": tiny.BATCH_SIZE // 2}
    first, second = ranks.run(in_a_rank, 2, tmp_path, folder, "two", run)
    assert first["sharded"] == second["sharded"] == bool(sharding)
    assert first["names"] == second["names"] == sorted(tiny.expert_prior())
    for name, param in alone.items():
        assert torch.equal(first["params"][name], second["params"][name])
        torch.testing.assert_close(first["params"][name], param, rtol=1e-4, atol=1e-5)


# No silent plain training


def has_trained(folder: Path, out: str) -> bool:
    return any((folder / out).rglob("*.safetensors"))


@pytest.mark.parametrize("plugins", [None, ["drift_kernels.integrations.not_there.DriftPlugin"]])
def test_a_plugin_that_is_not_loaded_stops_the_run(folder: Path, plugins: list[str] | None) -> None:
    """axolotl ignores a plugin that cannot be imported, and unknown keys."""
    with pytest.raises(ValueError, match="drift_adamw"):
        example.train(folder, "not-loaded", **{**drift(folder), "plugins": plugins})
    assert not has_trained(folder, "not-loaded")


def test_another_optimizer_stops_the_run(folder: Path) -> None:
    with pytest.raises(TypeError, match="expected a FusedDriftAdamW or a wrapper of one, got AcceleratedOptimizer"):
        example.train(folder, "replaced", **drift(folder, Replacing))
    assert not has_trained(folder, "replaced")


def test_an_axolotl_that_does_not_call_the_plugin_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DriftPlugin, "post_trainer_create", BasePlugin.post_trainer_create)
    with pytest.raises(TypeError, match="expected a FusedDriftAdamW or a wrapper of one, got AcceleratedOptimizer"):
        example.train(folder, "not-called", **drift(folder))
    assert not has_trained(folder, "not-called")


@pytest.mark.parametrize("missing", ["plugins", "optimizer", "drift"])
def test_the_three_entries_go_together(folder: Path, missing: str) -> None:
    PluginManager.get_instance().register(PLUGIN)
    entries = {key: value for key, value in drift(folder).items() if key != missing}
    if missing == "plugins":
        entries["plugins"] = [f"{Witness.__module__}.Witness"]
    with pytest.raises(ValueError, match=f"DRIFT requires three entries; missing: {missing}: "):
        example.train(folder, "two-of-three", **entries)


def test_a_plugin_of_an_earlier_run_does_nothing(folder: Path) -> None:
    short = {"max_steps": 2, "save_steps": 2}
    PluginManager.get_instance().register(PLUGIN)
    example.train(folder, "later", **short, plugins=[f"{Witness.__module__}.Witness"])
    assert not isinstance(Witness.trainer.optimizer.optimizer, FusedDriftAdamW)


REFUSED = {
    "deepspeed": "deepspeed_configs/zero1.json",
    "embedding_lr": 1e-4,
    "embedding_lr_scale": 0.1,
    "lisa_step_interval": 20,
    "loraplus_lr_ratio": 16,
    "lr_groups": [{"name": "attention", "modules": ["q_proj"], "lr": 1e-4}],
    "optim_args": {"fused": True},
    "optim_target_modules": ["q_proj"],
    "relora": True,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_would_be_ignored_is_refused(folder: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} cannot be combined with optimizer: drift_adamw: "):
        example.train(folder, "refused", **{**LORA, **drift(folder), key: REFUSED[key]})


def test_misuse_is_named_when_the_file_is_read(folder: Path) -> None:
    with pytest.raises(ValueError, match="drift has unknown keys: alhpa; expected keys among prior"):
        example.train(folder, "misuse", **drift(folder, alhpa=1.0))
    with pytest.raises(FileNotFoundError, match="drift-prior build"):
        example.train(folder, "misuse", **{**drift(folder), "drift": {"prior": str(folder / "nowhere")}})
    with pytest.raises(ValueError, match="drift requires `prior`"):
        example.train(folder, "misuse", **{**drift(folder), "drift": {"alpha": 1.0}})


def test_a_prior_of_another_model_is_refused(folder: Path) -> None:
    other = {**tiny.base_model().config.to_dict(), "hidden_size": 24}
    for name in ("other-base", "other-expert"):
        Qwen2ForCausalLM(Qwen2Config(**other)).save_pretrained(folder / name)
    build_prior(folder / "other-expert", folder / "other-base", folder / "other-prior")
    with pytest.raises(PriorError, match="shape"):
        example.train(folder, "other", **drift(folder, prior=str(folder / "other-prior")))
    assert not has_trained(folder, "other")


def test_the_documented_entries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = yaml.safe_load(documents.block_with("drift_kernels.integrations.axolotl.DriftPlugin"))
    monkeypatch.chdir(folder)
    example.run(folder, "documented", **entries, max_steps=2, save_steps=2, logging_steps=1)
    assert log(folder, "documented", 2)[-1]["prior/biased"] == len(tiny.expert_prior())
