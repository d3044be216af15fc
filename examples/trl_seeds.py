"""Runs the TRL examples over five seeds: prints a table, and writes trl.json.

python -m examples.trl_seeds
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
import trl

from benchmarks.rows import row_metadata

from . import tiny, trl_dpo, trl_grpo, trl_vision
from .trl_sft import quiet

SEEDS = range(5)
RESULTS = Path(__file__).parent / "results" / "trl.json"

Scores = dict[str, float]


def of_text(example: Any) -> Callable[..., Scores]:
    """The runs of DPO or GRPO."""

    def run(with_prior: bool, adapters: bool, seed: int, folder: Path) -> Scores:
        prior = tiny.expert_prior() if with_prior else None
        trainer = example.build(prior, folder, adapters=adapters, seed=seed)
        trainer.train()
        scores = {"right": tiny.held_out_accuracy(trainer.model), "loss": tiny.held_out_loss(trainer.model)}
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        return scores | ({"last_reward": rewards[-1]} if rewards else {})

    return run


def of_images(tower: bool = False) -> Callable[..., Scores]:
    def run(with_prior: bool, adapters: bool, seed: int, folder: Path) -> Scores:
        if not (folder / "vlm").exists():
            trl_vision.write_files(folder)
        trainer = trl_vision.build(with_prior, folder, adapters=adapters, tower=tower, seed=seed)
        trainer.train()
        loss, right = trl_vision.held_out(trainer)
        return {"right": right, "loss": loss}

    return run


EXAMPLES = {
    "DPO": of_text(trl_dpo),
    "GRPO": of_text(trl_grpo),
    "SFT with images": of_images(),
    "SFT with images, its tower trained too": of_images(tower=True),
}
COLUMNS = {  # adapters, with the prior
    "without prior": (False, False),
    "with the prior": (False, True),
    "LoRA, without": (True, False),
    "LoRA, with": (True, True),
}


def table(found: dict[str, dict[str, list[Scores]]]) -> str:
    """A Markdown table: correct held-out sums in percent, mean and standard deviation over the seeds."""
    rows = [["", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    rows += [[name, *(cell(by_column[column]) for column in COLUMNS)] for name, by_column in found.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(scores: list[Scores]) -> str:
    right = [100 * score["right"] for score in scores]
    return f"{statistics.mean(right):.0f} ± {statistics.stdev(right):.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.trl_seeds", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file (default: %(default)s)")
    out = parser.parse_args().out
    quiet()
    found: dict[str, dict[str, list[Scores]]] = {}
    for name, run in EXAMPLES.items():
        with tempfile.TemporaryDirectory() as folder:
            for column, (adapters, with_prior) in COLUMNS.items():
                scores = [run(with_prior, adapters, seed, Path(folder)) for seed in SEEDS]
                found.setdefault(name, {})[column] = scores
                print(f"{name}, {column}: {cell(scores)}", flush=True)
    made_by = row_metadata() | {module.__name__: module.__version__ for module in (transformers, trl)}
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": "python -m examples.trl_seeds", "made_by": made_by, "seeds": list(SEEDS), "results": found}
    out.write_text(json.dumps(content, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
