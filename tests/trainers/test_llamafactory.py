"""LLaMA-Factory with a prior: `drift-llamafactory train sft.yaml`, in this process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM, TrainerCallback

pytest.importorskip("llamafactory")

from checkpoints import FAMILIES, TOKENS, randomised
from documents import ROOT, block_with
from peft import PeftModel

from drift_kernels import FusedDriftAdamW
from drift_kernels.errors import PriorMismatchError
from drift_kernels.integrations import llamafactory as integration
from drift_kernels.integrations import unwrap_optimizer
from drift_kernels.integrations.transformers import use_drift
from drift_kernels.prior import build_prior
from examples import llamafactory_sft as example
from examples import tiny

FEW = 20  # steps, where two runs are compared


class Seen(TrainerCallback):
    """Records the Trainer's state at the end."""

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.optimizer: FusedDriftAdamW = unwrap_optimizer(optimizer)
        self.log = [entry for entry in state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints, a prior, a dataset, plain.yaml and sft.yaml."""
    tiny.quiet()
    folder = tmp_path_factory.mktemp("files")
    example.write_files(folder)
    return folder


def fit(folder: Path, out: Path, *overrides: str, file: str = "sft.yaml") -> tuple[nn.Module, Seen]:
    seen = Seen()
    example.run(folder / file, f"output_dir={out}", *overrides, callbacks=[seen] * (file != "plain.yaml"))
    return trained(out), seen


def trained(out: Path) -> nn.Module:
    """The trained model, with its adapters merged, if it has any."""
    if (out / "adapter_config.json").exists():
        return PeftModel.from_pretrained(tiny.base_model(), out).merge_and_unload()
    return Qwen2ForCausalLM.from_pretrained(out)


def way(model: nn.Module) -> dict[str, Tensor]:
    """The change of each parameter."""
    base = dict(tiny.base_model().named_parameters())
    return {name: (param - base[name]).detach() for name, param in model.named_parameters()}


def cosine(model: nn.Module) -> float:
    """The cosine of the model's change and the expert's, over the parameters in the prior."""
    prior, moved = tiny.expert_prior(), way(model)
    one, other = (torch.cat([tensors[name].flatten() for name in prior]) for tensors in (moved, prior))
    return float(nn.functional.cosine_similarity(one, other, dim=0))


def assert_close(found: nn.Module, expected: nn.Module, bound: float) -> None:
    """Check closeness relative to the change of each parameter."""
    ways, params = way(expected), dict(found.named_parameters())
    for name, param in expected.named_parameters():
        assert (params[name] - param).norm() <= bound * ways[name].norm(), name


# The three ways to fine-tune


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Fine-tuned by LLaMA-Factory, without a prior."""
    return fit(folder, tmp_path_factory.mktemp("plain"), file="plain.yaml")[0]


def test_full(folder: Path, tmp_path: Path, plain: nn.Module) -> None:
    model, seen = fit(folder, tmp_path)
    assert sorted(seen.optimizer.prior_names) == sorted(tiny.expert_prior())
    assert tiny.held_out_loss(model) < 0.5 * tiny.held_out_loss(plain)
    assert cosine(model) > cosine(plain) + 0.2
    assert [entry["prior/alpha"] for entry in seen.log] == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert all(entry["prior/biased"] == 20 for entry in seen.log)
    assert seen.optimizer.max_grad_norm == 1.0


def test_freeze(folder: Path, tmp_path: Path) -> None:
    steps = f"max_steps={FEW}"
    model, seen = fit(folder, tmp_path / "prior", "finetuning_type=freeze", "freeze_trainable_layers=1", steps)
    expected = [name for name in tiny.expert_prior() if "layers.1." in name]
    assert sorted(seen.optimizer.prior_names) == sorted(expected)
    assert {name for name, moved in way(model).items() if moved.any()} >= set(expected)
    assert not any(moved.any() for name, moved in way(model).items() if "layers.1." not in name)
    other, _ = fit(
        folder, tmp_path / "plain", "finetuning_type=freeze", "freeze_trainable_layers=1", steps, file="plain.yaml"
    )
    assert cosine(model) > cosine(other) + 0.1


def test_lora(folder: Path, tmp_path: Path) -> None:
    """The prior is projected onto the adapters, and then has their names."""
    lora = ("finetuning_type=lora", "lora_rank=8", "lora_target=all", "learning_rate=0.01", "max_steps=60")
    anchored = ("drift.anchor=true", "drift.prior_scaling=gradnorm", "drift.alpha=1", "drift.anneal=null")
    model, seen = fit(folder, tmp_path / "prior", *lora, *anchored)
    assert sorted(seen.optimizer.prior_names) == sorted(
        f"base_model.model.{name.removesuffix('weight')}lora_{factor}.default.weight"
        for name in tiny.expert_prior()
        if name.endswith("weight")
        for factor in "AB"
    )
    other, _ = fit(folder, tmp_path / "plain", *lora, file="plain.yaml")
    assert tiny.held_out_loss(model) < 0.5 * tiny.held_out_loss(other)
    assert cosine(model) > cosine(other) + 0.5


def test_without_strength_it_is_the_optimizer_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = (f"max_steps={FEW}", "logging_steps=5")
    model, seen = fit(folder, tmp_path / "zero", "drift.alpha=0", *few)
    assert seen.log[-1]["prior/biased"] == 0
    monkeypatch.setattr(integration, "use_drift", lambda trainer, **_: use_drift(trainer, prior=None))
    without, _ = fit(folder, tmp_path / "without", *few)
    assert tiny.same(model, without)
    monkeypatch.undo()
    assert not tiny.same(model, fit(folder, tmp_path / "with", *few)[0])


def test_resuming_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    few = [f"max_steps={FEW}", f"output_dir={tmp_path / 'out'}"]
    stopped = trained(example.run(folder / "sft.yaml", *few, callbacks=[example.StopAfter(FEW // 2)]))
    resumed = trained(example.run(folder / "sft.yaml", *few))
    whole, _ = fit(folder, tmp_path / "whole", few[0])
    assert tiny.same(resumed, whole)
    assert not tiny.same(stopped, whole)


@pytest.mark.parametrize("stage", ["pt", "dpo", "kto", "rm"])
def test_other_stages(folder: Path, tmp_path: Path, stage: str) -> None:
    rows, columns = [], {"prompt": "prompt", "query": "query", "response": "response"}
    for i, pair in enumerate(tiny.training_pairs(32)):
        right, wrong = str(tiny.right(pair)), str((tiny.right(pair) + 1) % 10)
        row = {"prompt": tiny.text(pair)[0], "query": "", "chosen": right, "rejected": wrong}
        rows.append({**row, "response": right if i % 2 else wrong, "good": bool(i % 2)})
    columns |= {"kto": {"kto_tag": "good"}, "pt": {}}.get(stage, {"chosen": "chosen", "rejected": "rejected"})
    columns = {"prompt": "prompt"} if stage == "pt" else columns
    info = {"file_name": "rows.json", "ranking": stage in ("dpo", "rm"), "columns": columns}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": info}))
    seen = Seen()
    config = integration.read([str(folder / "sft.yaml"), "max_steps=2", "logging_steps=1", f"stage={stage}"])
    config |= {"dataset": "rows", "dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out")}
    integration.train(config, [seen])
    before = "pretrained_model." if stage == "rm" else ""
    assert sorted(seen.optimizer.prior_names) == sorted(before + name for name in tiny.expert_prior())
    assert seen.log[0]["prior/biased"] == 20
    assert seen.log[0]["prior/ratio/attn"] > 0.1


def test_a_multimodal_model_with_a_text_expert(folder: Path, tmp_path: Path) -> None:
    """As the authors train, with their keys, on text only. LLaMA-Factory freezes the vision tower."""
    family = FAMILIES["qwen2_5_vl"]
    config = family.config()
    for i, key in enumerate(TOKENS):  # not those of words
        setattr(config, key, 90 + i)
    for name, model in (("vlm", randomised(Qwen2_5_VLForConditionalGeneration(config))), ("text", family.expert())):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    seen = Seen()
    config = integration.read([str(folder / "sft.yaml"), "max_steps=2", "logging_steps=1", "delta_prior_alpha=0.5"])
    config |= {"model_name_or_path": str(tmp_path / "vlm"), "delta_prior1_ckpt": str(tmp_path / "text")}
    integration.train({**config, "drift": None, "output_dir": str(tmp_path / "out")}, [seen])
    names = [name for name, _ in family.expert().named_parameters() if "_proj." in name]
    assert sorted(seen.optimizer.prior_names) == sorted(
        name.replace("model.", "model.language_model.") for name in names
    )
    assert seen.log[0]["prior/alpha"] == 0.5
    assert seen.log[0]["prior/ratio/attn"] > 0.1


# Two processes


def in_two_processes(folder: Path, out: Path, *overrides: str, file: str = "sft.yaml") -> str:
    """Start two processes, with the same global batch as one; return the command's output."""
    env = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    env |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env |= {"PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions"}  # of DeepSpeed, kept
    command = [sys.executable, "-m", "drift_kernels.integrations.llamafactory", "train", str(folder / file)]
    command += [f"output_dir={out}", f"per_device_train_batch_size={tiny.BATCH_SIZE // 2}", "ddp_backend=gloo"]
    done = subprocess.run([*command, *overrides], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def alphas(out: Path) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["prior/alpha"] for entry in history if "loss" in entry]


def test_two_processes_train_as_one_with_a_prior_that_one_of_them_builds(folder: Path, tmp_path: Path) -> None:
    keys = {"delta_prior1_ckpt": f"{folder}/expert", "delta_prior_alpha": 2.0, "delta_prior_scale": "gradnorm"}
    text = example.YAML.format(folder=folder, steps=FEW) + "".join(f"{key}: {value}\n" for key, value in keys.items())
    (folder / "authors.yaml").write_text(text)
    said = in_two_processes(folder, tmp_path / "two", file="authors.yaml")
    assert said.count("building the prior in") == said.count("using the existing prior in") == 1
    alone, seen = fit(folder, tmp_path / "one", file="authors.yaml")
    assert sorted(seen.optimizer.prior_names) == sorted(tiny.expert_prior())
    assert_close(trained(tmp_path / "two"), alone, 1e-3)


def test_zero_2_trains_as_one_process_by_hooks(folder: Path, tmp_path: Path) -> None:
    """With prior_scaling "absolute", whose bias is the same before and after the reduction."""
    pytest.importorskip("deepspeed")
    config = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
    config |= {"gradient_accumulation_steps": "auto", "zero_optimization": {"stage": 2}}
    config |= {"zero_force_ds_cpu_optimizer": False}
    (tmp_path / "zero2.json").write_text(json.dumps(config))
    drift = ["drift.prior_scaling=absolute", "drift.alpha=0.05", f"max_steps={FEW}", "logging_steps=5"]
    said = in_two_processes(folder, tmp_path / "two", f"deepspeed={tmp_path / 'zero2.json'}", *drift)
    assert said.count("DeepSpeed (ZeRO 2) removes the names of parameters: hooks bias 20 gradients") == 1
    alone, _ = fit(folder, tmp_path / "one", *drift)
    assert_close(trained(tmp_path / "two"), alone, 1e-3)
    assert alphas(tmp_path / "two") == alphas(tmp_path / "one") == pytest.approx([0.0375, 0.025, 0.0125, 0])
    without, _ = fit(folder, tmp_path / "zero", *drift, "drift.alpha=0")
    assert cosine(alone) > cosine(without) + 0.1


def test_several_machines_are_started_from_the_variables_that_llamafactory_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def options(**env: str) -> str:
        with monkeypatch.context() as patch:
            for key, value in env.items():
                patch.setenv(key, value)
            words = integration._torchrun(8, ["train", "sft.yaml"])
        assert words[-4:] == ["-m", integration.__name__, "train", "sft.yaml"]
        return " ".join(words[3:-4])

    assert options() == "--nproc-per-node 8 --standalone"
    assert options(NNODES="2", NODE_RANK="1", MASTER_ADDR="a", MASTER_PORT="1") == (
        "--nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr a --master-port 1"
    )
    assert options(RDZV_ID="job", MIN_NNODES="1", MAX_NNODES="3", MASTER_ADDR="a", MASTER_PORT="1") == (
        "--nproc-per-node 8 --nnodes 1:3 --rdzv-id job --rdzv-backend c10d --rdzv-endpoint a:1 --max-restarts 0"
    )


# Rejected settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drift": None}, "no prior: add `drift:`"),
        ({"delta_prior_alpha": 1.0}, "not both"),
        ({"drift": {"alpha": 1.0}}, "drift requires `prior`"),
        ({"drift": {"prior": "nowhere"}}, "no such folder: 'nowhere'"),
        ({"drift": {"prior": "{folder}/prior", "strength": 2}}, "drift has unknown keys: strength"),
        ({"drift": None, "delta_prior_strength": 2}, "unknown keys: delta_prior_strength"),
        ({"drift": None, "delta_prior1_ckpt": "{folder}/nowhere"}, "nowhere"),
        ({"optim": "sgd"}, "optim=sgd: FusedDriftAdamW would not be used"),
        ({"use_muon": True}, "use_muon=True"),
        ({"loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio=16.0"),
        ({"stage": "ppo"}, "whose trainers accept an optimizer, got 'ppo'"),
    ],
)
def test_a_file_that_would_not_train_with_the_prior_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    config = integration.read([str(folder / "sft.yaml")])
    changes = json.loads(json.dumps(changes).replace("{folder}", str(folder)))
    (tmp_path / "wrong.yaml").write_text(json.dumps({**config, **changes}))  # JSON is YAML
    assert integration.main(["train", str(tmp_path / "wrong.yaml")]) == 1
    assert message in capsys.readouterr().err


def test_anything_but_a_file_to_train_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["train"], ["export", "sft.yaml"], ["train", "sft.json"]):
        assert integration.main(arguments) == 2
        assert "usage: drift-llamafactory train FILE.yaml" in capsys.readouterr().err


def test_a_prior_of_another_model_is_an_error(folder: Path, tmp_path: Path) -> None:
    config = tiny.base_model().config
    config.hidden_size = 64
    for name in ("base", "expert"):
        type(tiny.base_model())(config).save_pretrained(tmp_path / name)
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    with pytest.raises(PriorMismatchError, match=r"48.*64"):
        fit(folder, tmp_path / "out", f"drift.prior={tmp_path / 'prior'}", "max_steps=1")


def test_another_optimizer_is_not_trained_with(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(model: nn.Module, *_: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters())

    monkeypatch.setattr("llamafactory.train.sft.trainer.create_custom_optimizer", other)
    with pytest.raises(TypeError, match="got AcceleratedOptimizer around AdamW"):
        fit(folder, tmp_path, "max_steps=1")


def test_a_broken_file_and_a_missing_trainer_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sft.yaml").write_text("a: [1,\n b")
    assert integration.main(["train", str(tmp_path / "sft.yaml")]) == 1
    assert "sft.yaml is not valid YAML: while parsing" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert integration.main(["train", str(tmp_path / "sft.yaml")]) == 1
    assert "LLaMA-Factory is not installed: pip install llamafactory" in capsys.readouterr().err


def test_another_trainer_is_noticed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamafactory.train.tuner.run_sft", lambda *_: None)
    with pytest.raises(RuntimeError, match="has trained without CustomSeq2SeqTrainer"):
        integration.train(integration.read([str(folder / "sft.yaml"), f"output_dir={tmp_path}"]))


# As documented


@pytest.mark.parametrize("words", ["anneal: 0.5", "delta_prior1_ckpt"])
def test_the_documented_blocks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.chdir(folder)
    text = example.YAML.format(folder=folder, steps=2) + block_with(words)
    (tmp_path / "sft.yaml").write_text(text)
    arguments = ["train", str(tmp_path / "sft.yaml"), f"output_dir={tmp_path / 'out'}", "logging_steps=1"]
    assert integration.main(arguments) == 0
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert history[0]["prior/bound"] == 20
