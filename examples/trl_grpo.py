"""TRL's GRPOTrainer: the model answers, and a function rewards right sums. The base knows the form of an answer, so one
in ten is right by chance; the rewards start from there.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from drift_kernels.integrations.transformers import use_drift

from . import tiny
from .transformers_trainer import StopAfter, arguments, figures
from .trl_dpo import ADAPTERS_LR, LORA, LR, OPTIONS, STEPS
from .trl_sft import quiet

COMPLETIONS, GENERATIONS = 64, 4


def prompts(count: int) -> Dataset:
    """`count` sums of the pairs to fine-tune on, with the right answers."""
    rows = [tiny.text(pair) for pair in tiny.training_pairs(count)]
    return Dataset.from_list([{"prompt": prompt, "answer": answer.strip()} for prompt, answer in rows])


def right_sum(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The reward: 1 if the first word is the answer, else 0."""
    return [float(said.split()[:1] == [right]) for said, right in zip(completions, answer, strict=True)]


def build(
    prior: tiny.Prior | None,
    folder: Path,
    steps: int = STEPS,
    stop_after: int | None = None,
    adapters: bool = False,
    seed: int = 0,
    beta: float = 0.0,
    **options: Any,
) -> GRPOTrainer:
    """A GRPOTrainer of the weights, or of adapters; `options` are passed to use_drift."""
    tiny.base_model().save_pretrained(folder / "base")
    lr = ADAPTERS_LR if adapters else LR
    run = {**arguments(folder / "run", steps), "learning_rate": lr}
    trainer = GRPOTrainer(
        model=str(folder / "base"),
        reward_funcs=right_sum,
        args=GRPOConfig(
            **{**run, "per_device_train_batch_size": COMPLETIONS},
            num_generations=GENERATIONS,
            max_completion_length=2,  # the answer and the end
            beta=beta,
            seed=seed,
            bf16=False,
        ),
        processing_class=tiny.tokenizer(),
        train_dataset=prompts(steps * COMPLETIONS // GENERATIONS),
        peft_config=LoraConfig(**LORA) if adapters else None,
        callbacks=[StopAfter(stop_after)],
    )
    trainer.remove_callback(PrinterCallback)
    use_drift(trainer, prior=prior, **{**OPTIONS, **options})
    return trainer


def train(prior: tiny.Prior | None, folder: Path, *, resume: bool = False, **options: Any) -> Any:
    """Return the fine-tuned model."""
    trainer = build(prior, folder, **options)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder / "run")) if resume else None)
    return trainer.model


def rewards(trainer: GRPOTrainer) -> list[float]:
    """The mean rewards over the training."""
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    quiet()
    with TemporaryDirectory() as folder:
        for adapters in (False, True):
            print("LoRA" if adapters else "all weights")
            tiny.show(partial(train, folder=Path(folder) / str(adapters), adapters=adapters), STEPS)
        for prior in (None, tiny.expert_prior()):
            trainer = build(prior, Path(folder))
            trainer.train()
            print("Mean rewards", "with the prior:" if prior else "without a prior:", *rewards(trainer))
        print("Added to the logs, first and last entry:", *figures(trainer), sep="\n")
