"""LLaMA-Factory's new trainer with a prior: `USE_V1=1 drift-llamafactory train sft.yaml`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2ForCausalLM

pytest.importorskip("llamafactory")

from llamafactory.v1.core.base_trainer import BaseTrainer
from llamafactory.v1.plugins.model_plugins.rendering import RenderingPlugin
from llamafactory.v1.trainers import sft_trainer
from llamafactory.v1.utils.types import ModelInput

from drift_kernels.integrations import llamafactory as integration
from drift_kernels.integrations import unwrap_optimizer
from examples import llamafactory_sft as example
from examples import tiny

YAML = """
model: {folder}/base
template: words
train_dataset: {folder}/dataset.yaml
micro_batch_size: 16
cutoff_len: 16
learning_rate: 1.0e-3
max_steps: 60
logging_steps: 15
bf16: false
batching_workers: 0
enable_activation_checkpointing: false
"""
DATASET = """
sums:
  path: {folder}/sums.json
  source: local
  converter: alpaca
"""


def render(processor: Any, messages: list[dict[str, Any]], *_: Any) -> ModelInput:
    """The words of all messages, one after the other: the tiny tokenizer knows none of a chat."""
    texts = [processor.encode(message["content"][0]["value"], add_special_tokens=False) for message in messages]
    weights = [message["loss_weight"] for message in messages]
    pairs = [(token, weight) for ids, weight in zip(texts, weights, strict=True) for token in ids]
    ids = [token for token, _ in pairs]
    labels = [token if weight else -100 for token, weight in pairs]
    loss_weights = [weight for _, weight in pairs]
    return ModelInput(input_ids=ids, attention_mask=[1] * len(ids), labels=labels, loss_weights=loss_weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny.quiet()
    folder = tmp_path_factory.mktemp("files")
    example.write_files(folder)
    (folder / "dataset.yaml").write_text(DATASET.format(folder=folder))
    (folder / "v1.yaml").write_text((YAML + example.DRIFT).format(folder=folder))
    RenderingPlugin._attempted_template_imports.add("words")
    RenderingPlugin("words").register("render_messages")(render)
    return folder


@pytest.fixture(autouse=True)
def _use_v1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_V1", "1")


def fit(folder: Path, out: Path, *overrides: str) -> Qwen2ForCausalLM:
    assert integration.main(["train", str(folder / "v1.yaml"), f"output_dir={out}", *overrides]) == 0
    return Qwen2ForCausalLM.from_pretrained(out)


def plain(folder: Path, out: Path) -> Qwen2ForCausalLM:
    config = integration.read([str(folder / "v1.yaml"), f"output_dir={out}"])
    del config["drift"]
    sft_trainer.run_sft(config)
    return Qwen2ForCausalLM.from_pretrained(out)


def test_it_trains_with_the_prior(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fit_of_base = BaseTrainer.fit
    monkeypatch.setattr(BaseTrainer, "fit", lambda self: (seen.append(self), fit_of_base(self))[1])
    with_prior = fit(folder, tmp_path / "prior")
    optimizer = unwrap_optimizer(seen[0].optimizer)
    assert sorted(optimizer.prior_names) == sorted(tiny.expert_prior())
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert tiny.held_out_loss(with_prior) < 0.7 * tiny.held_out_loss(plain(folder, tmp_path / "plain"))
    entries = [json.loads(line) for line in (tmp_path / "prior/trainer_log.jsonl").read_text().splitlines()]
    assert [entry["prior/alpha"] for entry in entries] == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert all(entry["prior/biased"] == 20 for entry in entries)


def test_lora(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(BaseTrainer, "save_model", lambda self: seen.append(self))
    arguments = [str(folder / "v1.yaml"), f"output_dir={tmp_path}", "max_steps=2"]
    lora = ["peft_config.name=lora", "peft_config.r=4", "peft_config.lora_alpha=8", "peft_config.target_modules=all"]
    assert integration.main(["train", *arguments, *lora]) == 0
    names = unwrap_optimizer(seen[0].optimizer).prior_names
    assert len(names) == 28
    assert all(".lora_" in name for name in names)


def test_another_optimizer_is_not_trained_with(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: BaseTrainer) -> None:
        params: list[nn.Parameter] = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(params)

    monkeypatch.setattr(BaseTrainer, "_init_optimizer", other)
    with pytest.raises(TypeError, match="got AdamW"):
        fit(folder, tmp_path)


def test_steps_that_are_not_taken_are_noticed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_of_base = BaseTrainer.fit

    def fit_with_another(self: BaseTrainer) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        fit_of_base(self)

    monkeypatch.setattr(BaseTrainer, "fit", fit_with_another)
    with pytest.raises(RuntimeError, match="but not with its FusedDriftAdamW"):
        fit(folder, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim_config.name=muon"], "optim_config would replace the optimizer"),
        (["dist_config.name=deepspeed"], "DeepSpeed flattens parameters"),
        (["drift.prior=nowhere"], "no such folder"),
        (["drift=null", "delta_prior1_ckpt={folder}/expert"], "does not support the authors' keys"),
    ],
)
def test_what_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str) -> None:
    overrides = [entry.format(folder=folder) for entry in overrides]
    assert integration.main(["train", str(folder / "v1.yaml"), *overrides]) == 1
    assert message in capsys.readouterr().err
