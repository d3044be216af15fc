"""axolotl: `optimizer: drift_adamw` and `drift:` in its YAML; axolotl's entry point trains, saves, and resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

# Read when axolotl and huggingface_hub are imported. No telemetry; all files are local.
os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "AXOLOTL_LOG_LEVEL": "ERROR", "LOG_LEVEL": "ERROR"}

from axolotl.cli.train import do_cli
from transformers import AutoModelForCausalLM

from . import tiny

DRIFT = """
plugins:
  - drift_kernels.integrations.axolotl.DriftPlugin
optimizer: drift_adamw
drift:
  prior: prior
  alpha: 2.0
  anneal: 1.0  # alpha decreases to 0 over the whole training
"""


def write_files(folder: Path) -> None:
    """Write the checkpoints, the prior, and the texts to train on."""
    tiny.write_files(folder)
    texts = [tiny.text(pair) for pair in tiny.training_pairs(tiny.STEPS * tiny.BATCH_SIZE)]
    rows = [{"instruction": prompt, "output": answer.strip()} for prompt, answer in texts]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def configuration(folder: Path, out: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a CPU run without the prior; `changes` are further entries."""
    format_of_texts = {"format": "{instruction} ", "no_input_format": "{instruction} "}
    return {
        "base_model": str(folder / "base"),
        "tokenizer_type": "PreTrainedTokenizerFast",
        "datasets": [{"path": str(folder / "texts.jsonl"), "ds_type": "json", "type": format_of_texts}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "output_dir": str(folder / out),
        "sequence_len": 16,
        "pad_to_sequence_len": True,
        "micro_batch_size": tiny.BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "max_steps": tiny.STEPS,
        "learning_rate": tiny.LR,
        "seed": 0,
        "weight_decay": 0.01,
        "lr_scheduler": "cosine",
        "max_grad_norm": 1.0,
        "optimizer": "adamw_torch",
        "bf16": False,
        "dataloader_pin_memory": False,
        "logging_steps": tiny.STEPS // 4,
        "save_steps": tiny.STEPS // 2,
        **changes,
    }


def drift(folder: Path, **settings: Any) -> dict[str, Any]:
    """The entries of `DRIFT`; `settings` are further entries under `drift:`."""
    entries = yaml.safe_load(DRIFT)
    entries["drift"] |= {"prior": str(folder / "prior"), **settings}
    return entries


@contextmanager
def silence() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def run(folder: Path, out: str, **changes: Any) -> None:
    """Do what `axolotl train` does with a YAML, in this process."""
    file = folder / f"{out}.yml"
    file.write_text(yaml.safe_dump(configuration(folder, out, **changes)))
    with silence():
        do_cli(str(file))


def train(folder: Path, out: str, **changes: Any) -> Any:
    """Return the fine-tuned model, as saved by axolotl."""
    run(folder, out, **changes)
    return AutoModelForCausalLM.from_pretrained(folder / out)


if __name__ == "__main__":
    tiny.quiet()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        print(f"held-out loss before fine-tuning       {tiny.held_out_loss(tiny.base_model()):.3f}")
        print(f"              after, without a prior   {tiny.held_out_loss(train(folder, 'without')):.3f}")
        whole = train(folder, "with", **drift(folder))
        print(f"              after, with the prior    {tiny.held_out_loss(whole):.3f}")
        halfway = folder / "with" / f"checkpoint-{tiny.STEPS // 2}"
        resumed = train(folder, "resumed", **drift(folder), resume_from_checkpoint=str(halfway))
        print(f"Resumed at step {tiny.STEPS // 2}, bitwise identical: {tiny.same(whole, resumed)}")
        log = json.loads((folder / "with" / f"checkpoint-{tiny.STEPS}" / "trainer_state.json").read_text())
        print("First and last log entries about the prior:")
        for entry in (log["log_history"][0], log["log_history"][-1]):
            print({key: round(value, 3) for key, value in entry.items() if "prior/" in key})
