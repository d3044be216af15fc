"""torchtitan trains with a prior: by its own train.py, in one process and under FSDP2."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchtitan")

# isort: off
from examples import torchtitan_llama3 as example  # before the rest of torchtitan: it brings the CPU

# isort: on
import torchtitan.models.llama3.config_registry
from documents import ROOT, block_with, commands_in
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import ConfigManager
from torchtitan.trainer import Trainer

from drift_kernels import FusedDriftAdamW, PriorError
from drift_kernels.integrations.torchtitan import use_drift
from examples import tiny

PLAIN = example.plain  # the config without a prior
STEPS = 8  # of short runs
LAYER = ("attention.qkv_linear.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
BIASED = sorted(f"layers.{i}.{rest}.weight" for i in range(example.LAYERS) for rest in LAYER)

Config = Callable[[], Trainer.Config]


@pytest.fixture(scope="module", autouse=True)
def _files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The example's files, in the working directory of all tests."""
    tiny.quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("titan"))
        patch.setattr("torchtitan.trainer.time.sleep", lambda seconds: None)
        example.write_files()
        yield


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[FusedDriftAdamW]:
    """Every FusedDriftAdamW, as it is made."""
    made: list[FusedDriftAdamW] = []
    build = FusedDriftAdamW.__init__

    def note(self: FusedDriftAdamW, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(FusedDriftAdamW, "__init__", note)
    return made


@pytest.fixture
def fine_tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., nn.Module]:
    """What train.py makes of a config, with arguments of its command line."""

    def run(config: Config, *arguments: str, steps: int = STEPS, into: str = "run") -> nn.Module:
        monkeypatch.setattr(example, "plain", config)
        return example.fine_tuned("plain", str(tmp_path / into), "--training.steps", str(steps), *arguments)

    return run


def with_prior(**settings: Any) -> Config:
    return lambda: use_drift(PLAIN(), **{"prior": "prior", "alpha": tiny.ALPHA, **settings})


def pull(model: nn.Module) -> float:
    """The cosine of the way that a model has gone and the delta, over all parameters that it has."""
    base, expert = tiny.base_and_expert(example.new_llama)

    def way(to: nn.Module) -> Tensor:
        pairs = zip(base.named_parameters(), to.parameters(), strict=True)
        return torch.cat([(there - here).detach().flatten() for (name, here), there in pairs if tiny.biased(name)])

    return float(torch.cosine_similarity(way(model), way(expert), dim=0))


def test_the_prior_is_what_the_training_follows(
    fine_tuned: Callable[..., nn.Module], optimizers: list[FusedDriftAdamW], tmp_path: Path
) -> None:
    without = fine_tuned(PLAIN, steps=tiny.STEPS)
    assert not optimizers
    model = fine_tuned(with_prior(), "--metrics.enable_tensorboard", steps=tiny.STEPS, into="with")
    assert sorted(optimizers[0].prior_names) == BIASED
    assert tiny.held_out_loss(model) < 0.3 * tiny.held_out_loss(without)
    assert pull(model) > 0.5 > pull(without) + 0.15

    (folder,) = {path.parent for path in (tmp_path / "with").rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    last = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert last["prior/alpha"] == tiny.ALPHA
    assert last["prior/biased"] == last["prior/bound"] == len(BIASED)
    assert {"prior/cosine/attn", "prior/cosine/mlp", "prior/ratio/mlp", "prior/grad_norm"} <= last.keys()


def test_alpha_of_zero_gives_the_bits_of_no_prior(
    fine_tuned: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = fine_tuned(with_prior(alpha=0.0))
    pulled = fine_tuned(with_prior(), into="pulled")
    build = FusedDriftAdamW.__init__
    monkeypatch.setattr(FusedDriftAdamW, "__init__", lambda *args, prior, **options: build(*args, **options))
    plain = fine_tuned(with_prior(), into="plain")
    assert tiny.same(idle, plain)
    assert not tiny.same(pulled, plain)


def test_a_run_that_stopped_ends_as_one_that_did_not(
    fine_tuned: Callable[..., nn.Module], optimizers: list[FusedDriftAdamW], tmp_path: Path
) -> None:
    whole = fine_tuned(with_prior(anneal=1.0))
    assert [group["alpha"] for group in optimizers[0].param_groups] == [0.0]
    resumed = example.stopped_and_resumed("plain", str(tmp_path / "stopped"), STEPS)
    assert len(optimizers) == 3
    assert tiny.same(whole, resumed)


def test_two_processes_under_fsdp2(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "examples.torchtitan_cpu"]
    command += ["--module", "examples.torchtitan_llama3", "--config", "with_prior", "--dump_folder", str(tmp_path)]
    command += ["--parallelism.spmd_backend", "partial_dtensor", "--optimizer.anneal", "None"]
    command += ["--training.local_batch_size", "2", "--training.steps", "20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert f"the prior acts on {len(BIASED)} of 17 trainable parameters" in done.stdout + done.stderr
    model = example.trained(str(tmp_path))
    assert pull(model) > 0.7


def test_what_the_documentation_shows(
    fine_tuned: Callable[..., nn.Module], optimizers: list[FusedDriftAdamW], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchtitan.models.llama3.config_registry, "llama3_8b", PLAIN)
    names: dict[str, Any] = {}
    exec(block_with("llama3_8b_drift"), names)
    fine_tuned(names["llama3_8b_drift"])
    assert sorted(optimizers[0].prior_names) == BIASED


def test_the_documented_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its options, as torchtitan reads them, with the documented module."""
    (command,) = commands_in(ROOT / "docs" / "trainers.md", "torchrun")
    monkeypatch.setattr(torchtitan.models.llama3.config_registry, "llama3_8b", PLAIN)
    (tmp_path / "my_jobs.py").write_text(block_with("llama3_8b_drift"))
    monkeypatch.syspath_prepend(str(tmp_path))
    words = shlex.split(command)
    assert words[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "torchtitan.train"]
    config = ConfigManager().parse_args(words[5:])
    assert config.optimizer.drift.settings["prior"] == "prior"
    assert config.checkpoint.initial_load_in_hf
    assert config.checkpoint.initial_load_path == "/path/to/the/base"


# What is refused


def test_settings_that_are_wrong() -> None:
    with pytest.raises(ValueError, match="requires `prior`"):
        use_drift(PLAIN(), alpha=1.0)
    with pytest.raises(FileNotFoundError, match="no such folder: 'nowhere'"):
        use_drift(PLAIN(), prior="nowhere")
    with pytest.raises(ValueError, match="unknown keys: alfa"):
        use_drift(PLAIN(), prior="prior", alfa=1.0)
    with pytest.raises(ValueError, match="priors do not support torchtitan's LoRA layers"):
        use_drift(PLAIN(), prior="prior", refresh=2)


def test_configs_that_do_not_fit() -> None:
    config = PLAIN()
    config.optimizer.param_groups[0].optimizer_name = "DistMuon"
    with pytest.raises(ValueError, match="the config has DistMuon"):
        use_drift(config, prior="prior")
    config = PLAIN()
    config.model_spec = replace(config.model_spec, state_dict_adapter=None)
    with pytest.raises(PriorError, match="no state_dict_adapter"):
        use_drift(config, prior="prior")


def test_pipeline_parallelism_is_refused() -> None:
    parts = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with pytest.raises(ValueError, match="does not support pipeline parallelism"):
        with_prior()().optimizer.build(model_parts=parts)


def adamw_after_all() -> Trainer.Config:
    config = with_prior()()
    config.optimizer = default_adamw()
    return config


def another_lr_scheduler() -> Trainer.Config:
    config = with_prior(anneal=0.5)()
    config.lr_scheduler = LRSchedulersContainer.Config()
    return config


@pytest.mark.parametrize(
    ("config", "arguments", "error", "message"),
    [
        (adamw_after_all, [], TypeError, "got AdamW: the trainer would train without the prior"),
        (with_prior(), ["--optimizer.param-groups.0.optimizer-name", "AdamW"], TypeError, "got AdamW"),
        (with_prior(), ["--optimizer.implementation", "fused_opt_states_bf16"], ValueError, "state_dtype='bfloat16'"),
        (another_lr_scheduler, [], RuntimeError, "anneal requires the lr_scheduler set by use_drift"),
    ],
)
def test_a_job_without_the_prior_does_not_start(
    config: Config,
    arguments: list[str],
    error: type[Exception],
    message: str,
    fine_tuned: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stepped: list[Any] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer: stepped.append(optimizer))
    monkeypatch.setattr(FusedDriftAdamW, "step", lambda optimizer: stepped.append(optimizer))
    try:
        with pytest.raises(error, match=message):
            fine_tuned(config, *arguments)
    finally:
        torch.distributed.destroy_process_group()
    assert not stepped
