"""TRL's SFTTrainer with images, full and with TRL's `peft_config`: the prior is that of a text expert."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from fine_tuned import ADAPTERS, FEW, expect_same, of_adapters, trained

if transformers.__version__ < "5":
    pytest.skip("its image processor without torchvision is one of transformers 5", allow_module_level=True)
pytest.importorskip("sklearn")

from transformers import Qwen2_5_VLForConditionalGeneration

from drift_kernels.integrations import unwrap_optimizer
from examples import tiny, trl_vision
from examples.digit_sums.data import DigitImages
from examples.digit_sums.qwen2_5_vl import patches
from examples.trl_sft import quiet

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    quiet()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VLM with its processor, a text expert, and the prior that `build_prior` built from the two."""
    folder = tmp_path_factory.mktemp("vision")
    trl_vision.write_files(folder)
    return folder


def in_vlm(names: list[str]) -> list[str]:
    return [name.replace("model.", "model.language_model.", 1) for name in names]


def test_the_processor_makes_what_the_model_was_aligned_with(files: Path) -> None:
    """Pixels and grids as from `patches`, one token per image, labels only for the answer and the end."""
    trainer = trl_vision.build(False, files, steps=1)
    images, rng = DigitImages(0, 300).test, random.Random(7)
    drawn = [rng.choice(images[digit]) for digit in (3, 4)]
    batch = trainer.data_collator([trl_vision.conversation((3, 4), images, random.Random(7))])
    words = ("<image>", "plus", "<image>", "ends", "in", "7", "<eos>")
    assert batch["input_ids"].tolist() == [[(*tiny.WORDS, "<image>").index(word) for word in words]]
    assert (batch["labels"][0] >= 0).tolist() == [False] * 5 + [True] * 2
    assert batch["mm_token_type_ids"].tolist() == [[1, 0, 1, 0, 0, 0, 0]]
    torch.testing.assert_close(batch["pixel_values"], patches(torch.stack(drawn)), rtol=0, atol=1e-6)


@ADAPTERS
def test_a_text_expert_teaches_sums_of_images(files: Path, adapters: bool) -> None:
    """The text prior's names match the VLM, whose vision tower is frozen."""
    right = {}
    for with_prior in (False, True):
        trainer = trl_vision.build(with_prior, files, adapters=adapters)
        trainer.train()
        _, right[with_prior] = trl_vision.held_out(trainer)
    assert right[False] < 0.15
    assert right[True] > 0.3
    names = in_vlm(list(tiny.expert_prior()))
    names = of_adapters(names) if adapters else names
    assert sorted(unwrap_optimizer(trainer.optimizer).prior_names) == sorted(names)
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        assert entry["prior/biased"] == entry["prior/bound"] == len(names)
        assert entry["prior/cosine/attn"] != 0
    start = Qwen2_5_VLForConditionalGeneration.from_pretrained(files / "vlm").model.visual
    model = trainer.model.unload() if adapters else trainer.model
    assert tiny.same(model.model.visual, start)


@ADAPTERS
def test_a_vision_tower_that_is_trained_is_not_pulled(files: Path, adapters: bool) -> None:
    """It has MLPs with the language model's names and shapes. In the first step, an unclipped absolute bias moves its
    own parameters and no others."""
    options = {"adapters": adapters, "tower": True, "steps": 1, "prior_scaling": "absolute", "anchor": False}
    after = {}
    for alpha in (0.0, 50.0):
        trainer = trl_vision.build(True, files, alpha=alpha, max_grad_norm=None, **options)
        trainer.args.max_grad_norm = 0
        start = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
        after[alpha] = trained(trainer)
    names = in_vlm(list(tiny.expert_prior()))
    names = of_adapters(names) if adapters else names
    assert sorted(unwrap_optimizer(trainer.optimizer).prior_names) == sorted(names)
    differ = {name for name, param in after[0.0].items() if not torch.equal(param, after[50.0][name])}
    at_first = {name for name in names if "lora_A" not in name}  # A is not pulled until B has grown
    assert differ == at_first
    assert any(not torch.equal(param, start[name]) for name, param in after[0.0].items() if ".visual." in name)


@ADAPTERS
def test_an_alpha_of_0_has_the_bits_of_no_prior_with_images(files: Path, adapters: bool) -> None:
    plain, unbiased = (
        trained(trl_vision.build(with_prior, files, adapters=adapters, steps=FEW, alpha=0.0))
        for with_prior in (False, True)
    )
    expect_same(plain, unbiased)
