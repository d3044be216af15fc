"""A seed's models and priors on disk, each made once, when a run first needs it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from .data import Example, SeedData, chain, reading, text_examples
from .families import FAMILIES, with_language_model
from .priors import drift_prior
from .settings import Settings, Stage, World
from .train import adamw, answers, fit, share_right

AfterStep = Callable[[str], object]  # called with the name of what is trained


class Checkpoints:
    """The base, the reader, experts and priors of one seed and family, in their own folder.

    Args:
        seed: determines the initial weights and the order of the examples.
        settings: the stages and the sizes.
        world: the family, and how long its expert is trained.
        root: parent of the folders of all seeds and families.
        after_step: called after every optimizer step.
    """

    def __init__(self, seed: int, settings: Settings, world: World, root: Path, after_step: AfterStep) -> None:
        self.seed, self.settings, self.after_step = seed, settings, after_step
        self.family = FAMILIES[world.family]
        self.expert_steps = world.expert_steps or settings.expert.steps
        self.folder = root / f"{world.family}-seed-{seed}"
        self._expert_score_file = self.folder / f"expert_{self.expert_steps}_score.json"

    def missing(self) -> dict[Path, int]:
        """The models and the expert's score that do not exist yet, with the optimizer steps that each takes."""
        stages = {
            self.folder / "base": self.settings.base.steps,
            self.folder / "reader": self.settings.reader.steps,
            self.folder / f"expert_{self.expert_steps}": self.expert_steps,
            self._expert_score_file: 0,
        }
        return {path: steps for path, steps in stages.items() if not path.exists()}

    def data(self) -> SeedData:
        sizes = self.settings
        return SeedData.of(
            self.seed, sizes.reader_examples, sizes.tuning_examples, sizes.test_examples, sizes.test_images
        )

    def base(self) -> Path:
        """A text model that copies two digits."""

        def make(out: Path) -> None:
            model = self.family.text_model(self.seed)
            self._fit("base", model, self.settings.base, text_examples(reading))
            model.save_pretrained(out)

        return self._once("base", make)

    def expert(self) -> Path:
        """A text model that adds, trained from the base."""

        def make(out: Path) -> None:
            model = self._load_base()
            self._fit("expert", model, replace(self.settings.expert, steps=self.expert_steps), text_examples(chain))
            model.save_pretrained(out)

        return self._once(f"expert_{self.expert_steps}", make)

    def reader(self) -> Path:
        """A multimodal model that reads: the base behind a vision tower."""

        def make(out: Path) -> None:
            model = with_language_model(self.family, self._load_base(), self.seed)
            self._fit("reader", model, self.settings.reader, self.data().readings)
            model.save_pretrained(out)

        return self._once("reader", make)

    def expert_score(self) -> float:
        """The share of all text sums that the expert gets right."""

        def make(out: Path) -> None:
            sums = text_examples(chain)
            expert = self.family.TEXT_MODEL.from_pretrained(self.expert())
            out.write_text(json.dumps(share_right(answers(expert, sums, self.family), sums)))

        return json.loads(self._once(self._expert_score_file.name, make).read_text())

    def prior(self, modules: str = "default", rank: int | None = None, biases: bool = True) -> Path:
        """DRIFT's prior: expert - reader. Adapters have no biases to pull."""
        options = ["--modules", modules]
        if rank is not None:
            options += ["--rank", str(rank)]
        if not biases:
            options.append("--no-bias")
        name = f"prior_{modules}_{rank or 'whole'}{'' if biases else '_no_bias'}"
        return self._build(name, self.expert(), *options)

    def task_vector(self) -> Path:
        """The expert's task vector, for merging: expert - base."""
        return self._build("task_vector", self.expert(), "--reference", self.base(), "--dtype", "fp32")

    def own_vector(self) -> Path:
        """The reader's task vector: reader - base."""
        return self._build("own_vector", self.reader(), "--reference", self.base(), "--dtype", "fp32")

    def ties_vector(self, density: float) -> Path:
        """The two task vectors merged by TIES, keeping `density` of each."""
        vectors = (self.task_vector(), self.own_vector())
        method = ("--method", "ties", "--weights", 1, 1, "--density", density, "--dtype", "fp32")
        name = f"ties_{density}_{self.expert_steps}"
        return self._once(name, lambda out: drift_prior("combine", *vectors, *method, "--out", out))

    def adapters(self, prior: Path, rank: int) -> Path:
        """LoRA adapters initialized along a prior."""
        options = ("--base", self.reader(), "--rank", rank)
        return self._once(
            f"adapters_{rank}_{prior.name}", lambda out: drift_prior("init-lora", prior, *options, "--out", out)
        )

    def _build(self, name: str, expert: Path, *options: object) -> Path:
        models = ("--expert", expert, "--base", self.reader())
        return self._once(
            f"{name}_{self.expert_steps}", lambda out: drift_prior("build", *models, *options, "--out", out)
        )

    def _load_base(self) -> PreTrainedModel:
        return self.family.TEXT_MODEL.from_pretrained(self.base())

    def _fit(self, name: str, model: PreTrainedModel, stage: Stage, examples: list[Example]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            after_step = [lambda: self.after_step(name)]
            optimizer = adamw(model, stage)
            fit(model, examples, self.family, optimizer, stage, after_step, seed=self.seed, folder=Path(folder))

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the path `name`, made by `make` if it does not exist. The output is moved there as a whole, so that an
        interruption leaves nothing incomplete; if two processes make the same, the first one's is kept."""
        out = self.folder / name
        if not out.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=f".{name}-") as unfinished:
                make(Path(unfinished) / name)
                try:
                    (Path(unfinished) / name).rename(out)
                except OSError:
                    if not out.exists():
                        raise
        return out
