"""ms-swift: a one-line plugin file, and the settings in the YAML file. Runs what `swift sft sft.yaml` runs, in this
process."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import yaml
from swift.callbacks import callbacks_map
from swift.cli.main import parse_yaml_args
from swift.pipelines import sft_main
from torch import nn
from transformers import Qwen2ForCausalLM

from . import tiny
from .transformers_trainer import StopAfter

PLUGIN = "import drift_kernels.integrations.ms_swift"

# The template of the tiny model's texts, which swift does not know.
TEMPLATE = """
from swift.template import TemplateMeta, register_template

register_template(TemplateMeta("sums", prefix=[], prompt=["{{QUERY}}"], chat_sep=None), exist_ok=True)
"""


def quiet() -> None:
    tiny.quiet()
    datasets.disable_progress_bars()
    logging.getLogger("swift").setLevel(logging.ERROR)


def write_files(folder: Path) -> None:
    """Write the models and the prior, the plugin, and the sums to learn."""
    tiny.write_files(folder)
    (folder / "plugin.py").write_text(PLUGIN + TEMPLATE)
    with (folder / "sums.jsonl").open("w") as file:
        for pair in tiny.training_pairs(tiny.STEPS * tiny.BATCH_SIZE):
            roles = zip(("user", "assistant"), map(str.strip, tiny.text(pair)), strict=True)
            print(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}), file=file)


def configuration(folder: Path, prior: Path | None) -> dict[str, Any]:
    """The content of a YAML file, for a CPU run."""
    drift = {"optimizer": "drift", "optim_args": {"prior": str(prior), "alpha": tiny.ALPHA}}
    return {
        "model": str(folder / "base"),
        "model_type": "qwen2",  # swift cannot tell it from the model's name
        "template": "sums",
        "dataset": str(folder / "sums.jsonl"),
        "split_dataset_ratio": 0,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "lazy_tokenize": True,
        "dataloader_num_workers": 0,
        "external_plugins": str(folder / "plugin.py"),
        **(drift if prior is not None else {}),
        "tuner_type": "full",
        "torch_dtype": "float32",
        "fp16": False,
        "use_cpu": True,
        "check_model": False,
        "output_dir": str(folder / "out"),
        "add_version": False,
        "max_steps": tiny.STEPS,
        "per_device_train_batch_size": tiny.BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "learning_rate": tiny.LR,
        "weight_decay": 0,
        "adam_beta2": 0.999,
        "max_grad_norm": 1.0,
        "save_steps": tiny.STEPS,
        "logging_steps": tiny.STEPS // 4,
        "report_to": "none",
        "disable_tqdm": True,
    }


def run(config: dict[str, Any], file: Path, main: Callable[..., dict[str, Any]] = sft_main) -> dict[str, Any]:
    """Do what `swift sft FILE` does with a YAML file of this configuration; return swift's record of the run."""
    file.write_text(yaml.safe_dump(config))
    arguments = [str(file)]
    parse_yaml_args(arguments)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # hides its progress
        return main(arguments)


def train(
    prior: tiny.Prior | None, folder: Path, *, stop_after: int | None = None, resume: bool = False
) -> Qwen2ForCausalLM:
    """Fine-tune from the files in the folder; return the model."""
    callbacks_map["stop_after"] = lambda args, trainer: StopAfter(stop_after)
    config = configuration(folder, None if prior is None else folder / "prior") | {"callbacks": "stop_after"}
    if resume:
        config["resume_from_checkpoint"] = str(folder / f"out/checkpoint-{tiny.STEPS // 2}")
    run(config, folder / "sft.yaml")
    return trained(folder / "out")


def trained(out: Path) -> nn.Module:
    return Qwen2ForCausalLM.from_pretrained(out / "last-checkpoint")


if __name__ == "__main__":
    quiet()
    with TemporaryDirectory() as folder:
        write_files(Path(folder))
        tiny.show(partial(train, folder=Path(folder)))
