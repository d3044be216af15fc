"""For LLaMA-Factory: `drift-llamafactory train FILE.yaml` is `llamafactory-cli train FILE.yaml` with `drift:` in it::

    drift:
      prior: prior        # the folder that `drift-prior build` wrote
      alpha: 1.0          # and other keys of drift_settings

The keys of the authors' fork are read too (`AuthorsSettings`). All other keys are LLaMA-Factory's, and so are
`key=value` arguments after the file, such as `drift.alpha=0.5`. Under DeepSpeed (ZeRO 1 and 2) hooks bias the gradients
(`use_hooks`). FORCE_TORCHRUN, NPROC_PER_NODE and similar variables have the same effect as there, and USE_V1 selects
the new trainer.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

from torch import nn

from ..optimizer import FusedDriftAdamW
from ..prior import Prior
from .authors_keys import AuthorsSettings, is_ours
from .for_model import drift_optimizer
from .hooked import use_hooks
from .settings import drift_settings
from .step_figures import step_figures
from .training_run import AlphaOverTime, TrainingRun
from .transformers import use_drift

Settings: TypeAlias = dict[str, Any] | AuthorsSettings

USAGE = "usage: drift-llamafactory train FILE.yaml [key=value ...]   (for all else: llamafactory-cli)"

# Where LLaMA-Factory finds the trainer of a stage. `ppo` does not use a transformers Trainer.
TRAINERS = {
    "pt": ("llamafactory.train.pt.workflow", "CustomTrainer"),
    "sft": ("llamafactory.train.sft.workflow", "CustomSeq2SeqTrainer"),
    "rm": ("llamafactory.train.rm.workflow", "PairwiseTrainer"),
    "dpo": ("llamafactory.train.dpo.trainer", "CustomDPOTrainer"),
    "kto": ("llamafactory.train.kto.workflow", "CustomKTOTrainer"),
}

# Keys that select another optimizer or trainer.
_OTHERS = (
    *("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "loraplus_lr_ratio"),
    *("optim_args", "optim_target_modules", "use_hyper_parallel"),
)
_ADAMW = (None, "adamw_torch", "adamw_torch_fused")  # which FusedDriftAdamW replaces


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status, which is 2 for a wrong command line and 1 if the file cannot be trained as it is.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) < 2 or arguments[0] not in ("train", "sft") or not arguments[1].endswith((".yaml", ".yml")):
        print(USAGE, file=sys.stderr)
        return 2
    if importlib.util.find_spec("llamafactory") is None:
        print("drift-llamafactory: LLaMA-Factory is not installed: pip install llamafactory", file=sys.stderr)
        return 1
    if "LOCAL_RANK" not in os.environ and (processes := _processes()):
        return subprocess.run(_torchrun(processes, arguments), env=_torchrun_env()).returncode
    try:
        ours, theirs = split(read(arguments[1:]))
        (_check_v1 if _is_on("USE_V1") else _check)(ours, theirs)
    except (ValueError, TypeError, OSError) as error:
        print(f"drift-llamafactory: {error}", file=sys.stderr)
        return 1
    if _is_on("USE_V1"):
        _train_v1(cast(dict[str, Any], ours), theirs)
    else:
        _train(ours, theirs)
    return 0


def train(config: Mapping[str, Any], callbacks: Sequence[Any] = ()) -> None:
    """Train in this process, like `main`, from a file's contents.

    Args:
        config: LLaMA-Factory's keys and ours.
        callbacks: transformers' callbacks, for LLaMA-Factory.

    Raises:
        ValueError, TypeError: no prior, two forms of settings at once, an invalid setting, or another optimizer.
        FileNotFoundError: the prior does not exist.
        PriorError, CheckpointError: the prior is damaged or does not fit the model.
    """
    ours, theirs = split(config)
    _check(ours, theirs)
    _train(ours, theirs, callbacks)


def read(arguments: Sequence[str]) -> dict[str, Any]:
    """Read a file and its overrides, as LLaMA-Factory does.

    Args:
        arguments: the YAML file, then `key=value` strings.

    Returns:
        The contents.

    Raises:
        ValueError: the file is not YAML.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        merged = OmegaConf.merge(OmegaConf.load(Path(arguments[0]).absolute()), OmegaConf.from_cli(list(arguments[1:])))
    except YAMLError as error:
        raise ValueError(f"{arguments[0]} is not valid YAML: {error}") from None
    return dict(OmegaConf.to_container(merged))


def split(config: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """Split a configuration into our settings, checked, and LLaMA-Factory's keys.

    Args:
        config: the contents of a file.

    Returns:
        The settings and the other keys.

    Raises:
        ValueError, TypeError, FileNotFoundError: as `train`.
    """
    authors = {key: value for key, value in config.items() if is_ours(key)}
    theirs = {key: value for key, value in config.items() if key != "drift" and key not in authors}
    nested = config.get("drift")
    if nested is None and not authors:
        raise ValueError(
            "no prior: add `drift:` with `prior:`, the folder that `drift-prior build` wrote, or the keys of the "
            "authors' fork (delta_prior1_ckpt, ...); to train without a prior, use llamafactory-cli"
        )
    if nested is not None and authors:
        raise ValueError(f"use either `drift:` or the authors' keys ({', '.join(authors)}), not both")
    return (drift_settings(nested) if nested is not None else AuthorsSettings.of(authors)), theirs


def _check(ours: Settings, theirs: Mapping[str, Any]) -> None:
    """Raises ValueError for keys that would select another optimizer, or a trainer that does not get ours."""
    others = [f"{key}={theirs[key]}" for key in _OTHERS if theirs.get(key)]
    if theirs.get("optim") not in _ADAMW:
        others.append(f"optim={theirs['optim']}")
    others += [f"{name}={os.environ[name]}" for name in ("USE_MCA", "USE_RAY") if _is_on(name)]
    if others:
        raise ValueError(f"{', '.join(others)}: FusedDriftAdamW would not be used: leave it out")
    if (stage := theirs.get("stage", "sft")) not in TRAINERS:
        raise ValueError(
            f"stage must be one of {', '.join(TRAINERS)}, whose trainers accept an optimizer, got {stage!r}"
        )


def _train(ours: Settings, theirs: Mapping[str, Any], callbacks: Sequence[Any] = ()) -> None:
    from llamafactory.train.tuner import run_exp

    def give(trainer: Any) -> None:
        options = ours if isinstance(ours, dict) else _authors_options(ours, trainer.args, theirs)
        (use_hooks if trainer.args.deepspeed_plugin is not None else use_drift)(trainer, **options)

    with _each_trainer(*TRAINERS[theirs.get("stage", "sft")], give):
        run_exp(dict(theirs), list(callbacks))


@contextmanager
def _each_trainer(module_name: str, name: str, give: Callable[[Any], None]) -> Iterator[None]:
    """Inside this context, LLaMA-Factory's trainer of this name is passed to `give` as soon as it is made. Raises
    RuntimeError if none was made.
    """
    module = importlib.import_module(module_name)
    plain, made = getattr(module, name), []

    class DriftTrainer(plain):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(name)
            give(self)

    setattr(module, name, DriftTrainer)
    try:
        yield
    finally:
        setattr(module, name, plain)
    if not made:
        raise RuntimeError(f"this version of LLaMA-Factory has trained without {name}, and so without the prior")


def _authors_options(ours: AuthorsSettings, args: Any, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """With the prior, built by the first process (of each machine, unless they share a disk) while others wait."""
    base, revision = str(theirs["model_name_or_path"]), theirs.get("model_revision", "main")
    if not Path(base).exists() and revision != "main":
        base = f"{base}@{revision}"
    local = not theirs.get("data_shared_file_system", False)
    first = (args.local_process_index if local else args.process_index) == 0
    with args.main_process_first(local=local, desc="building the prior"):
        folder = ours.prior(base, Path(args.output_dir) / "drift_prior", may_build=first)
    return ours.options(Prior.open(folder))


# LLaMA-Factory's new trainer


def _check_v1(ours: Settings, theirs: Mapping[str, Any]) -> None:
    """Raises ValueError for what the new trainer cannot do with a prior."""
    if not isinstance(ours, dict):
        raise ValueError("the v1 trainer does not support the authors' keys: use `drift:`")
    if theirs.get("optim_config") is not None:
        raise ValueError("optim_config would replace the optimizer of `drift:`: leave it out")
    if (theirs.get("dist_config") or {}).get("name") == "deepspeed":
        raise ValueError(
            "dist_config: DeepSpeed flattens parameters, which loses their names: train without it, or with the "
            "classic trainer (ZeRO 1 and 2)"
        )


def _train_v1(ours: dict[str, Any], theirs: Mapping[str, Any]) -> None:
    """v1 clips the gradient before the bias, to its own `max_grad_norm`."""
    from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
    from llamafactory.v1.trainers import sft_trainer

    alpha = AlphaOverTime(anneal=ours.pop("anneal", None))
    OptimizerPlugin("drift").register()(_v1_optimizer)
    lr = float(theirs.get("learning_rate", 1e-4))  # LLaMA-Factory's default
    with _each_trainer(sft_trainer.__name__, "SFTTrainer", lambda trainer: _accompany_v1(trainer, alpha)):
        sft_trainer.run_sft({**theirs, "optim_config": {"name": "drift", "lr": lr, **ours}})


def _accompany_v1(trainer: Any, alpha: AlphaOverTime) -> None:
    """Its callbacks get no trainer when they are made, and `run_sft` takes none."""
    from llamafactory.v1.utils.callbacks.trainer_callback import TrainerCallback

    done, total = trainer.global_step, trainer.num_training_steps
    run = TrainingRun(trainer.optimizer, alpha, done, total, trainer.args.max_grad_norm)

    class Accompany(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, **_: Any) -> None:
            run.after_step()

        def on_log(self, args: Any, state: Any, logs: dict[str, Any], **_: Any) -> None:
            logs.update(step_figures(run.optimizer))

    trainer.callback_handler.callbacks.insert(0, Accompany())


def _v1_optimizer(model: nn.Module, config: Mapping[str, Any]) -> FusedDriftAdamW:
    options = {key: value for key, value in config.items() if key != "name"}
    return drift_optimizer(getattr(model, "module", model), **options)  # unwraps DDP


# Several processes


def _is_on(name: str) -> bool:
    return os.environ.get(name, "0").lower() in ("true", "y", "1")


def _processes() -> int:
    """How many processes to start on this machine, as LLaMA-Factory decides; 0 to train in this one."""
    forced, asked = _is_on("FORCE_TORCHRUN"), os.environ.get("NPROC_PER_NODE")
    if forced and asked:
        return int(asked)
    from llamafactory.extras.misc import get_device_count

    devices = get_device_count()
    return int(asked or max(devices, 1)) if forced or (devices > 1 and not _is_on("USE_KT")) else 0


def _torchrun(processes: int, arguments: Sequence[str]) -> list[str]:
    """The command, from the variables that LLaMA-Factory reads."""
    env = os.environ
    address = env.get("MASTER_ADDR", "127.0.0.1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if "RDZV_ID" in env:
        nodes = env.get("NNODES", "1")
        if "MIN_NNODES" in env and "MAX_NNODES" in env:
            nodes = f"{env['MIN_NNODES']}:{env['MAX_NNODES']}"
        command += ["--nnodes", nodes, "--rdzv-id", env["RDZV_ID"], "--rdzv-backend", "c10d"]
        command += ["--rdzv-endpoint", f"{address}:{env.get('MASTER_PORT', 0)}"]
        command += ["--max-restarts", env.get("MAX_RESTARTS", "0")]
    elif "MASTER_PORT" in env or env.get("NNODES", "1") != "1":
        command += ["--nnodes", env.get("NNODES", "1"), "--node-rank", env.get("NODE_RANK", "0")]
        command += ["--master-addr", address, "--master-port", env.get("MASTER_PORT", "29500")]
    else:
        command += ["--standalone"]
    return [*command, "-m", __spec__.name if __spec__ else __name__, *arguments]


def _torchrun_env() -> dict[str, str]:
    """LLaMA-Factory sets these two for its processes, unless OPTIM_TORCH is 0."""
    if os.environ.get("OPTIM_TORCH", "1").lower() not in ("true", "y", "1"):
        return dict(os.environ)
    tuned = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"}
    return {**os.environ, **tuned}


if __name__ == "__main__":
    sys.exit(main())
