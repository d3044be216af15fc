"""Every code block of the README and of docs, run as printed on a tiny model: its stand-ins are defined here.

Shell commands are in test_documented_commands.py."""

from __future__ import annotations

import copy
import os
import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as lightning
import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
import transformers
import trl
from accelerate import Accelerator
from datasets import Dataset
from documents import ROOT, block_with, blocks, commands_in
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import drift_kernels
from drift_kernels import FusedDriftAdamW
from drift_kernels.cli import main
from drift_kernels.integrations import named_groups, step_figures, unwrap_optimizer
from examples import tiny

EXPERT, BASE = "DeepSeek-R1-Distill-Qwen-7B", "Qwen2.5-VL-7B-Instruct"


# Each block, by words that no other has.
BLOCKS = {
    "a better AdamW": "lr=1e-5, weight_decay=0.01",
    "bfloat16": "# unbiased, no extra memory",
    "with a prior": "linear_anneal(total_steps // 2)",
    "in the backward pass": "optimizer.attach_to_backward()",
    "any optimizer": "bias.apply_()",
    "adapters in short": "named_groups(peft_model)",
    "adapters": "LoraConfig(r=16",
    "Trainer": "trainer = Trainer(model, args",
    "TRL": "trainer = SFTTrainer(model, args=args",
    "Accelerate": "accelerator.prepare",
    "Lightning": "def configure_optimizers(self)",
    "Lightning's Trainer": "lightning.Trainer(max_steps",
    "fully_shard": "fully_shard(model)",
    "saving": "dcp.save(",
    "going on": "dcp.load(",
    "verification": "verification.intact",
}


# Blocks that run inside a trainer, by such words -> the file in tests/trainers that says them.
TRAINERS = ROOT / "tests" / "trainers"
IN_TRAINERS = {
    "anneal: 0.5": "test_llamafactory.py",
    "delta_prior1_ckpt": "test_llamafactory.py",
    "drift_kernels.integrations.ms_swift": "test_ms_swift.py",
    "external_plugins:": "test_ms_swift.py",
    "drift_kernels.integrations.axolotl.DriftPlugin": "test_axolotl.py",
    "llama3_8b_drift": "test_torchtitan.py",
}


def run(which: str, names: dict[str, Any]) -> None:
    """A block with these names; what it defines is added to them."""
    exec(block_with(BLOCKS[which]), names)


def test_no_block_is_left_out() -> None:
    """Each has the words of one entry; and whoever is to run it says its name, or its words."""
    told = {**BLOCKS, **{words: words for words in IN_TRAINERS}}
    found = sorted(words for block in blocks() for words in told.values() if words in block)
    assert found == sorted(told.values())
    assert len(blocks()) == len(told)
    text = Path(__file__).read_text()
    assert all(f'run("{which}", ' in text or f', "{which}", ' in text for which in BLOCKS)
    assert all(f'"{words}"' in (TRAINERS / test).read_text() for words, test in IN_TRAINERS.items())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both checkpoints and, after the README's commands, the prior."""
    folder = tmp_path_factory.mktemp("documented")
    base, expert = tiny.base_and_expert()
    base.save_pretrained(folder / BASE)
    expert.save_pretrained(folder / EXPERT)
    commands = [command.split(maxsplit=1)[1] for command in commands_in(ROOT / "README.md", "drift-prior")]
    assert [command.split()[0] for command in commands] == ["build", "inspect", "check"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            assert main(shlex.split(command)) == 0
    assert (folder / "prior.png").stat().st_size > 0
    return folder


@pytest.fixture
def given(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks take for granted, in the folder of the prior."""
    monkeypatch.chdir(checkpoints)
    batch = tiny.together([tiny.encoded(pair) for pair in tiny.training_pairs(8)])
    return {
        "torch": torch,
        "model": tiny.base_model().train(),
        "loader": [batch] * 3,
        "total_steps": 6,
        **{name: getattr(drift_kernels, name) for name in ("AlphaScheduler", "FusedDriftAdamW", "linear_anneal")},
    }


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def moved(model: nn.Module, before: list[Tensor]) -> bool:
    return not any(map(torch.equal, weights(model), before))


def check_biased(optimizer: FusedDriftAdamW) -> None:
    assert len(optimizer.prior_names) == len(tiny.expert_prior())


def test_verification(given: dict[str, Any]) -> None:
    run("verification", given | {"Prior": drift_kernels.Prior})


# The README


def test_a_better_adamw(given: dict[str, Any]) -> None:
    run("a better AdamW", given)
    before = weights(given["model"])
    given["model"](**given["loader"][0]).loss.backward()
    given["optimizer"].step()
    assert moved(given["model"], before)


def test_bfloat16_weights(given: dict[str, Any]) -> None:
    made = []
    model = given["model"].to(torch.bfloat16)
    run("bfloat16", {"model": model, "FusedDriftAdamW": lambda *args, **kwargs: made.append((args, kwargs))})
    assert len(made) == 3
    for _, options in made:
        tuned = copy.deepcopy(model)
        before, optimizer = weights(tuned), FusedDriftAdamW(tuned.parameters(), **options)
        tuned(**given["loader"][0]).loss.backward()
        optimizer.step()
        assert not all(map(torch.equal, weights(tuned), before))


def test_with_a_prior_and_in_the_backward_pass(given: dict[str, Any]) -> None:
    before = weights(given["model"])
    run("with a prior", given)
    check_biased(given["optimizer"])
    assert moved(given["model"], before)
    assert given["optimizer"].param_groups[0]["alpha"] == 0  # it has been annealed
    before = weights(given["model"])
    run("in the backward pass", given)
    assert moved(given["model"], before)
    assert all(param.grad is None for param in given["model"].parameters())
    given["handle"].remove()


def test_any_optimizer(given: dict[str, Any]) -> None:
    run("any optimizer", given)
    plain = tiny.base_model().train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6)
    for batch in given["loader"]:
        plain(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert not all(map(torch.equal, weights(given["model"]), weights(plain)))


def test_adapters(given: dict[str, Any]) -> None:
    plain = tiny.base_model()
    run("adapters", given)
    given["model"](**given["loader"][0]).loss.backward()
    given["optimizer"].step()
    adapted = sum(name.endswith("_proj.weight") for name in tiny.expert_prior())
    assert len(given["optimizer"].prior_names) == 2 * adapted
    given["peft_model"] = given["model"]
    run("adapters in short", given)
    given["optimizer"].step()
    assert len(given["optimizer"].prior_names) == 2 * adapted
    assert all(map(torch.equal, plain.parameters(), given["model"].unload().parameters()))  # the base stays


def in_trainer(given: dict[str, Any], which: str, config: type, **options: Any) -> None:
    """A block whose Trainer trains for two steps."""
    given["args"] = config(
        "out", use_cpu=True, max_steps=2, logging_steps=1, report_to="none", save_strategy="no", bf16=False, **options
    )
    run(which, given)
    trainer = given["trainer"]
    check_biased(unwrap_optimizer(trainer.optimizer))
    assert unwrap_optimizer(trainer.optimizer).max_grad_norm == 1.0  # the arguments'
    assert [trainer.state.log_history[step]["prior/alpha"] for step in (0, 1)] == [0, 0]  # half of the steps is one
    assert "prior/cosine/attn" in trainer.state.log_history[0]


def test_transformers_trainer(given: dict[str, Any]) -> None:
    rows = [tiny.encoded(pair) for pair in tiny.training_pairs(16)]
    in_trainer(given | {"Trainer": transformers.Trainer, "dataset": rows}, "Trainer", transformers.TrainingArguments)


def test_trl(given: dict[str, Any]) -> None:
    texts = [tiny.text(pair) for pair in tiny.training_pairs(16)]
    dataset = Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in texts])
    trainer = partial(trl.SFTTrainer, processing_class=tiny.tokenizer())
    in_trainer(given | {"SFTTrainer": trainer, "dataset": dataset}, "TRL", trl.SFTConfig)


def test_accelerate(given: dict[str, Any]) -> None:
    logged = []
    accelerator = Accelerator(cpu=True)
    accelerator.log = lambda figures, step: logged.append(figures)  # type: ignore[method-assign]
    given |= {"accelerator": accelerator, "lr_schedule": None}
    run("Accelerate", given)
    accelerator.backward(given["model"](**given["loader"][0]).loss)
    given["optimizer"].step()
    check_biased(unwrap_optimizer(given["optimizer"]))
    assert logged == [{}]  # there had been no step
    assert "prior/cosine/mlp" in step_figures(given["optimizer"])


def test_lightning(given: dict[str, Any], tmp_path: Path) -> None:
    given |= {"named_groups": named_groups, "CosineAnnealingLR": CosineAnnealingLR}
    run("Lightning", given)

    class FineTuning(LightningModule):
        configure_optimizers = given["configure_optimizers"]

        def __init__(self) -> None:
            super().__init__()
            self.model = given["model"]

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**batch).loss

    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    logger = TensorBoardLogger(tmp_path)
    given["lightning"] = SimpleNamespace(
        Trainer=lambda **options: lightning.Trainer(
            accelerator="cpu", log_every_n_steps=1, logger=logger, **quiet, **{**options, "max_steps": 4}
        )
    )
    run("Lightning's Trainer", given)
    rows = [tiny.encoded(pair) for pair in tiny.training_pairs(32)]
    given["trainer"].fit(FineTuning(), DataLoader(rows, 8))
    optimizer = unwrap_optimizer(given["trainer"].optimizers[0])
    assert [group["alpha"] for group in optimizer.param_groups] == [0, 0]  # since half of the steps
    assert len(optimizer.covered_names) == len(tiny.expert_prior())


# docs/priors.md


def test_merging(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [command.split(maxsplit=1)[1] for command in commands_in(ROOT / "docs" / "priors.md", "drift-prior")]
    commands = [command for command in commands if command.split()[0] in ("combine", "apply")]
    assert len(commands) == 3
    for name, source in (("prior-math", "prior"), ("prior-code", "prior"), (BASE, BASE)):
        (tmp_path / name).symlink_to(checkpoints / source)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main(shlex.split(command)) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged")
    assert not all(map(torch.equal, weights(merged), weights(tiny.base_model())))


# docs/distributed.md


def several_processes(folder: Path) -> list[list[Tensor]]:
    """Parameters after two steps: in one go, and with a checkpoint between them."""
    os.chdir(folder)
    tools = {f.__name__: f for f in (FusedDriftAdamW, fully_shard, get_state_dict, set_state_dict)}
    batch = tiny.together([tiny.encoded(pair) for pair in tiny.training_pairs(8)])
    found, given = [], {}
    for goes_on in (False, True):
        given = tools | {"dcp": dcp, "folder": str(folder / "checkpoint"), "model": tiny.base_model()}
        run("fully_shard", given)
        if goes_on:
            run("going on", given)
        for step in (1,) if goes_on else (0, 1):
            given["model"](**batch).loss.backward()
            given["optimizer"].step()
            given["optimizer"].zero_grad()
            check_biased(given["optimizer"])
            if step == 0:
                run("saving", given)
        found.append([param.full_tensor() for param in weights(given["model"])])
    return found


def test_several_processes(checkpoints: Path, tmp_path: Path) -> None:
    for straight, resumed in ranks.run(several_processes, 2, tmp_path, checkpoints):
        assert all(map(torch.equal, straight, resumed))
