"""ms-swift: the prior's effect in full fine-tuning and LoRA, resuming, two processes, and rejected settings."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import ROOT, block_with
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

pytest.importorskip("swift.pipelines", reason="make test-trainers TRAINER=ms-swift")

import yaml
from peft import PeftModel
from swift.callbacks import callbacks_map
from swift.optimizers import OptimizerCallback, optimizers_map
from swift.pipelines import rlhf_main, sft_main
from swift.trainers import Seq2SeqTrainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drift_kernels import FusedDriftAdamW, PriorError, build_prior
from drift_kernels.integrations import named_groups, unwrap_optimizer
from examples import swift_sft, tiny

STEPS = 8  # of runs that are compared bitwise
SHORT = {"max_steps": STEPS, "save_steps": STEPS // 2, "logging_steps": 1}
LORA = {"tuner_type": "lora", "target_modules": "all-linear", "lora_rank": 8, "learning_rate": 5e-3}

# swift keeps its process group until the interpreter exits; gloo's threads sometimes abort the process there.
AT_EXIT = "\nimport atexit\nfrom torch.distributed import destroy_process_group, is_initialized\n"
AT_EXIT += "atexit.register(lambda: is_initialized() and destroy_process_group())\n"


class Watch(TrainerCallback):
    """Keeps the optimizer."""

    def __init__(self) -> None:
        self.optimizer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.optimizer = optimizer


@dataclass
class Run:
    out: Path
    optimizer: Any
    logs: list[dict[str, Any]] = field(repr=False)  # of the training only

    def checkpoint(self, step: int) -> Path:
        return self.out / f"checkpoint-{step}"

    def weights(self, step: int = STEPS) -> dict[str, Tensor]:
        (file,) = self.checkpoint(step).glob("*model.safetensors")
        return load_file(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    swift_sft.quiet()
    folder = tmp_path_factory.mktemp("files")
    swift_sft.write_files(folder)
    (folder / "plugin.py").write_text((folder / "plugin.py").read_text() + AT_EXIT)
    return folder


def configuration(folder: Path, out: Path, settings: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The configuration of a run with the prior; `settings` are DRIFT's, `changes` swift's; None removes an entry."""
    config = swift_sft.configuration(folder, folder / "prior") | {"output_dir": str(out)}
    config["optim_args"] |= settings or {}
    return {key: value for key, value in (config | changes).items() if value is not None}


def train(config: dict[str, Any], main: Callable[..., dict[str, Any]] = sft_main) -> Run:
    watch, out = Watch(), Path(config["output_dir"])
    callbacks_map["watch"] = lambda args, trainer: watch
    record = swift_sft.run(config | {"callbacks": "watch"}, out.with_suffix(".yaml"), main)
    return Run(out, watch.optimizer, [entry for entry in record["log_history"] if "loss" in entry])


def without_drift(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return configuration(folder, out, optimizer=None, **changes) | {"optim_args": ""}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# The prior's effect


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(configuration(folder, tmp_path_factory.mktemp("whole"), report_to="tensorboard", logging_steps=30))


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(without_drift(folder, tmp_path_factory.mktemp("plain")))


def mean_cosine(trained: dict[str, Tensor]) -> float:
    """The mean cosine of the training's changes and the prior."""
    base = tiny.base_model().state_dict()
    moved = {name: trained[name] - base[name] for name in tiny.expert_prior()}
    cosines = [
        torch.cosine_similarity(moved[name].flatten(), delta.flatten(), dim=0)
        for name, delta in tiny.expert_prior().items()
    ]
    return float(torch.stack(cosines).mean())


def test_the_expert_comes_across(whole: Run, plain: Run) -> None:
    with_prior, without = (tiny.held_out_loss(swift_sft.trained(run.out)) for run in (whole, plain))
    assert with_prior < 0.4 * without
    assert mean_cosine(whole.weights(tiny.STEPS)) > 0.3 + mean_cosine(plain.weights(tiny.STEPS))


def test_what_it_acts_on(whole: Run, plain: Run) -> None:
    assert sorted(unwrap_optimizer(whole.optimizer).biased_names) == sorted(tiny.expert_prior())
    assert type(plain.optimizer.optimizer) is torch.optim.AdamW
    assert unwrap_optimizer(whole.optimizer).max_grad_norm == 1.0  # the configuration's
    assert [group["weight_decay"] for group in unwrap_optimizer(whole.optimizer).param_groups] == [0, 0]


def test_swift_shows_the_texts_as_they_are_meant(whole: Run) -> None:
    pairs = tiny.training_pairs(tiny.STEPS * tiny.BATCH_SIZE)[: tiny.BATCH_SIZE]
    batch = tiny.together([tiny.encoded(pair) for pair in pairs])
    assert whole.logs[0]["loss"] == pytest.approx(tiny.base_model()(**batch).loss.item(), rel=1e-5)


def test_trackers_get_the_figures(whole: Run) -> None:
    events = EventAccumulator(str(whole.out / "runs"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/prior/alpha")] == [tiny.ALPHA] * 5
    assert {"train/prior/bound", "train/prior/cosine/attn", "train/prior/ratio/mlp"} <= set(events.Tags()["scalars"])


def test_alpha_by_pattern(folder: Path, tmp_path: Path) -> None:
    """A mapping within the mapping."""
    run = train(configuration(folder, tmp_path / "out", {"alpha": {r"re:layers\.1\.": 2.0}}, **SHORT))
    assert sorted(unwrap_optimizer(run.optimizer).biased_names) == [
        name for name in sorted(tiny.expert_prior()) if ".layers.1." in name
    ]


# LoRA


def test_the_expert_comes_across_to_adapters(folder: Path, tmp_path: Path) -> None:
    """The prior of the weights, projected onto the adapters."""
    run = train(configuration(folder, tmp_path / "drift", {"anchor": True}, **LORA))
    model = PeftModel.from_pretrained(tiny.base_model(), run.checkpoint(tiny.STEPS), is_trainable=True)
    factors = {name for name, param in model.named_parameters() if param.requires_grad}
    assert {name.split(".lora_")[0] for name in factors} == {
        f"base_model.model.{name.removesuffix('.weight')}" for name in tiny.expert_prior() if name.endswith(".weight")
    }
    assert set(unwrap_optimizer(run.optimizer).biased_names) == factors
    plain = train(without_drift(folder, tmp_path / "plain", **LORA))
    other = PeftModel.from_pretrained(tiny.base_model(), plain.checkpoint(tiny.STEPS))
    assert tiny.held_out_loss(model) < 0.4 * tiny.held_out_loss(other)


# swift rlhf


def test_dpo(folder: Path, tmp_path: Path) -> None:
    """Right sums against wrong ones."""
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for i, pair in enumerate(tiny.training_pairs(tiny.STEPS * tiny.BATCH_SIZE)):
            question, right = map(str.strip, tiny.text(pair))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": right}]
            wrong = (int(right) + 1 + i % 9) % 10
            print(json.dumps({"messages": messages, "rejected_response": str(wrong)}), file=file)
    dpo = {"rlhf_type": "dpo", "dataset": str(tmp_path / "pairs.jsonl")}
    run = train(configuration(folder, tmp_path / "drift", **dpo), rlhf_main)
    plain = train(without_drift(folder, tmp_path / "plain", **dpo), rlhf_main)
    assert sorted(unwrap_optimizer(run.optimizer).biased_names) == sorted(tiny.expert_prior())
    assert tiny.held_out_loss(swift_sft.trained(run.out)) < 0.4 * tiny.held_out_loss(swift_sft.trained(plain.out))


# Bit for bit


def test_alpha_0_is_the_optimizer_without_a_prior(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithoutPrior(OptimizerCallback):
        def create_optimizer(self, model: Any = None) -> FusedDriftAdamW:
            groups = named_groups(self.trainer.model, self.args.weight_decay)
            self.trainer.optimizer = FusedDriftAdamW(groups, lr=self.args.learning_rate, max_grad_norm=1.0)
            return self.trainer.optimizer

    monkeypatch.setitem(optimizers_map, "without_prior", WithoutPrior)
    changes = {**SHORT, "optimizer": "without_prior", "optim_args": "", "max_grad_norm": 0}
    without = train(configuration(folder, tmp_path / "without") | changes)
    zero = train(configuration(folder, tmp_path / "zero", {"alpha": 0}, **SHORT))
    assert [entry["prior/biased"] for entry in zero.logs] == [0] * STEPS
    assert same(zero.weights(), without.weights())
    assert not same(train(configuration(folder, tmp_path / "two", **SHORT)).weights(), zero.weights())


@pytest.mark.parametrize("changes", [{"torch_dtype": "bfloat16", "fp16": None}, LORA], ids=["full", "lora"])
def test_resuming(changes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """With alpha decreasing to 0, and bfloat16 tensors rounded stochastically."""
    settings = {"anneal": 0.75, "rounding": "stochastic", "state_dtype": "bfloat16", "seed": 3}
    changes = {**changes, **SHORT}
    run = train(configuration(folder, tmp_path / "whole", settings, **changes))
    halfway = str(run.checkpoint(STEPS // 2))
    resumed = train(configuration(folder, tmp_path / "resumed", settings, **changes, resume_from_checkpoint=halfway))
    assert len(resumed.logs) == len(run.logs)  # the state has those of the first half
    assert resumed.logs[-1]["prior/alpha"] == run.logs[-1]["prior/alpha"] == 0
    assert resumed.logs[-4]["prior/alpha"] == run.logs[-4]["prior/alpha"] == pytest.approx(tiny.ALPHA / 6)
    assert same(resumed.weights(), run.weights())
    assert not same(run.weights(STEPS // 2), run.weights())
    assert not resumed.checkpoint(STEPS // 2).exists()


# The command


def command(config: dict[str, Any], **environment: str) -> None:
    file = Path(config["output_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [Path(sys.executable).parent / "swift", "sft", file],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        check=True,
        timeout=300,
    )


def free_port() -> str:
    """Below those that Linux gives to other processes' connections, one of which could be this before it is used."""
    ports = range(20_000 + os.getpid() % 10_000, 32_768)
    return str(next(port for port in ports if socket.socket().connect_ex(("127.0.0.1", port))))


def test_the_command_in_two_processes(folder: Path, tmp_path: Path) -> None:
    """The same rows in each step as in one process."""
    one = train(configuration(folder, tmp_path / "one", **SHORT))
    half = {"per_device_train_batch_size": tiny.BATCH_SIZE // 2, "ddp_backend": "gloo"}
    command(configuration(folder, tmp_path / "two", **SHORT, **half), NPROC_PER_NODE="2", MASTER_PORT=free_port())
    two = Run(tmp_path / "two", None, [])
    base = tiny.base_model().state_dict()
    for name, weight in one.weights().items():
        torch.testing.assert_close(two.weights()[name], weight, rtol=0, atol=1e-5)
        assert (weight - base[name]).abs().max() > 1e-3


def test_deepspeed_in_two_processes(folder: Path, tmp_path: Path) -> None:
    """ZeRO 2: hooks, and swift's own AdamW. With "absolute", each rank may bias its own gradients."""
    pytest.importorskip("deepspeed")
    settings, changes = {"prior_scaling": "absolute", "alpha": 0.05}, {**SHORT, "max_grad_norm": 0}
    one = train(configuration(folder, tmp_path / "one", settings, **changes))
    plain = train(without_drift(folder, tmp_path / "plain", **changes))
    half = {"per_device_train_batch_size": tiny.BATCH_SIZE // 2, "ddp_backend": "gloo", "deepspeed": "zero2"}
    config = configuration(folder, tmp_path / "two", settings, **changes, **half)
    command(config, NPROC_PER_NODE="2", MASTER_PORT=free_port(), DS_ACCELERATOR="cpu")
    two = Run(tmp_path / "two", None, []).weights()
    for name, weight in one.weights().items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)
    assert all((two[name] - plain.weights()[name]).abs().max() > 1e-3 for name in tiny.expert_prior())


def test_the_documented_form(folder: Path, tmp_path: Path) -> None:
    plugin = block_with("drift_kernels.integrations.ms_swift")
    settings = yaml.safe_load(block_with("external_plugins:"))
    (tmp_path / settings["external_plugins"]).write_text(plugin + swift_sft.TEMPLATE)
    settings["external_plugins"] = str(tmp_path / settings["external_plugins"])
    settings["optim_args"]["prior"] = str(folder / settings["optim_args"]["prior"])
    run = train(swift_sft.configuration(folder, None) | SHORT | settings | {"output_dir": str(tmp_path / "out")})
    assert sorted(unwrap_optimizer(run.optimizer).biased_names) == sorted(tiny.expert_prior())


# Rejected settings


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"settings": {"prior": None}}, ValueError, "optim_args requires `prior`"),
        ({"settings": {"alhpa": 1.0}}, ValueError, "unknown keys: alhpa; expected keys among prior, alpha"),
        ({"settings": {"prior": "nowhere"}}, FileNotFoundError, "no such folder: 'nowhere'"),
        ({"settings": {"alpha": {"router": 1.0}}}, ValueError, "alpha by pattern: .* got 'router'"),
        ({"settings": {"alpha": {"re:layers.9.": 1.0}}}, ValueError, "matches none of the prior's 20 deltas"),
        ({"optim_args": "prior=prior,alpha=1.0"}, TypeError, "must be a mapping .* got 'prior=prior,alpha=1.0'"),
        ({"optim_args": None}, TypeError, "optim_args must be a mapping"),
        ({"vit_lr": 1e-6}, ValueError, "vit_lr would have no effect"),
        ({"optim": "adafactor"}, ValueError, "have optim='adafactor'"),
        ({"optimizer": None}, ValueError, "but the optimizer is default, .* add `--optimizer drift`"),
        ({"optimizer": None, "vit_lr": 1e-6}, ValueError, "but the optimizer is multimodal"),
        ({"freeze_parameters_ratio": 1.0, "trainable_parameters": "lm_head"}, PriorError, "0 of 20 deltas are bound"),
    ],
)
def test_misuse(changes: dict[str, Any], error: type[Exception], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        train(configuration(folder, tmp_path / "out", **SHORT, **changes))


def test_the_prior_of_another_model(folder: Path, tmp_path: Path) -> None:
    for name, seed in ("base", 0), ("expert", 1):
        torch.manual_seed(seed)
        wider = Qwen2Config(**tiny.base_model().config.to_dict() | {"intermediate_size": 128})
        Qwen2ForCausalLM(wider).save_pretrained(tmp_path / name)
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    with pytest.raises(PriorError, match=r"gate_proj.*128"):
        train(configuration(folder, tmp_path / "out", {"prior": str(tmp_path / "prior")}, **SHORT))


def test_without_the_plugin_the_settings_are_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because they are a mapping, which transformers' own optimizers do not accept."""
    monkeypatch.setitem(optimizers_map, "default", OptimizerCallback)
    with pytest.raises(ValueError, match="unpack"):
        train(configuration(folder, tmp_path / "out", **SHORT, optimizer=None))
    monkeypatch.delitem(optimizers_map, "drift")
    with pytest.raises(KeyError, match="drift"):
        train(configuration(folder, tmp_path / "out", **SHORT))


def test_a_trainer_that_makes_another_optimizer_is_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_optimizer(self: Any, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        return self.optimizer

    monkeypatch.setattr(Seq2SeqTrainer, "create_optimizer", create_optimizer)
    with pytest.raises(TypeError, match="around AdamW: the trainer would train without the prior"):
        train(configuration(folder, tmp_path / "out", **SHORT))


def test_a_plugin_without_the_optimizer_is_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(without_drift(folder, tmp_path / "out", **SHORT))
    assert "the plugin is loaded, but the optimizer is default: this is plain fine-tuning" in caplog.text
