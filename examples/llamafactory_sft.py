"""LLaMA-Factory: `drift-llamafactory train sft.yaml` is `llamafactory-cli train sft.yaml` with a prior in the YAML."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import disable_progress_bars
from transformers import Qwen2ForCausalLM

from . import tiny
from .transformers_trainer import StopAfter

os.environ |= {"LLAMAFACTORY_VERBOSITY": "ERROR", "HF_HUB_OFFLINE": "1"}  # read when LLaMA-Factory is imported

YAML = """
model_name_or_path: {folder}/base
finetuning_type: full
stage: sft
do_train: true

dataset_dir: {folder}
dataset: sums
template: empty
cutoff_len: 16

output_dir: {folder}/out
per_device_train_batch_size: 16
learning_rate: 1.0e-3
lr_scheduler_type: cosine
max_steps: {steps}
logging_steps: 30
save_strategy: "no"
overwrite_cache: true
disable_tqdm: true
report_to: none
use_cpu: true
"""

DRIFT = """
drift:
  prior: {folder}/prior
  alpha: 2.0
  anneal: 1.0
"""


def write_files(folder: Path, steps: int = tiny.STEPS) -> None:
    """Write the input of both commands: checkpoints, a prior, a dataset; `plain.yaml`, and `sft.yaml` with the
    prior."""
    tiny.write_files(folder)
    texts = [tiny.text(pair) for pair in tiny.training_pairs(steps * tiny.BATCH_SIZE)]
    rows = [{"instruction": prompt, "input": "", "output": f"{answer.strip()} {tiny.EOS}"} for prompt, answer in texts]
    (folder / "sums.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": "sums.json"}}))
    (folder / "plain.yaml").write_text(YAML.format(folder=folder, steps=steps))
    (folder / "sft.yaml").write_text((YAML + DRIFT).format(folder=folder, steps=steps))


def run(file: Path, *overrides: str, callbacks: Sequence[Any] = ()) -> Path:
    """Train with the settings in the file; return the folder of the model."""
    from llamafactory.train.tuner import run_exp

    from drift_kernels.integrations.llamafactory import read, train

    config = read([str(file), *overrides])
    with redirect_stdout(io.StringIO()):  # it prints a training example, and metrics
        if file.name == "plain.yaml":
            run_exp(config, list(callbacks))
        else:
            train(config, callbacks)
    return Path(config["output_dir"])


def train(prior: tiny.Prior | None, folder: Path, *, stop_after: int | None = None, resume: bool = False) -> Any:
    """Return the fine-tuned model."""
    file = folder / ("plain.yaml" if prior is None else "sft.yaml")
    out = run(file, f"overwrite_output_dir={not resume}", callbacks=[StopAfter(stop_after)])
    return Qwen2ForCausalLM.from_pretrained(out)


if __name__ == "__main__":
    tiny.quiet()
    disable_progress_bars()
    with TemporaryDirectory() as folder:
        write_files(Path(folder))
        tiny.show(partial(train, folder=Path(folder)))
