"""TRL's SFTTrainer with images: `[3] plus [4] ends in 7`, with handwritten digits in place of words.

The model is a Qwen2.5-VL whose language model is tiny.py's base, behind a vision tower trained to map digits to words.
The prior is from the TEXT expert, which has never seen an image.
"""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from transformers import (
    PrinterCallback,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)
from trl import SFTConfig, SFTTrainer

from drift_kernels import FusedDriftAdamW, build_prior
from drift_kernels.integrations.transformers import use_drift

from . import tiny
from .digit_sums.data import IMAGE, IMAGE_SIZE, DigitImages, ImagesByDigit
from .digit_sums.qwen2_5_vl import GRID, MERGE_SIZE, PATCH_SIZE, VISION, patches
from .transformers_trainer import arguments, figures
from .trl_dpo import ADAPTERS_LR, LORA, LR, OPTIONS, STEPS
from .trl_sft import quiet

LANGUAGE = r".*language_model.*_proj"
TEST_IMAGES = 300

TEMPLATE = """\
{% for message in messages %}{% for part in message.content %}\
{{ '<image>' if part.type == 'image' else part.text }}\
{% endfor %}{{ '<eos>' if message.role == 'assistant' }}{% endfor %}"""


class Processor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without the part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.image_token_id = IMAGE, tokenizer.convert_tokens_to_ids(IMAGE)


def processor() -> Processor:
    """A processor with tiny.py's words, and a token for an image of 8 x 8 pixels with values up to 16."""
    words = tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": [IMAGE]})
    pixels = Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        temporal_patch_size=VISION["temporal_patch_size"],
        merge_size=MERGE_SIZE,
        size={"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2},
        rescale_factor=1 / 16,
        image_mean=0.5,
        image_std=0.5,
        do_convert_rgb=False,
    )
    return Processor(pixels, words, chat_template=TEMPLATE)


# The model


def new_model(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """tiny.py's base behind a fresh vision tower."""
    base = tiny.base_model()
    base.resize_token_embeddings(len(tiny.WORDS) + 1)
    text = base.config.to_dict()
    rotary = text.pop("rope_parameters")
    thirds = [base.config.hidden_size // base.config.num_attention_heads // 6] * 3  # time, height and width
    sizes = {key: text[key] for key in ("hidden_size", "intermediate_size")}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_scaling": {**rotary, "type": "mrope", "mrope_section": thirds}},
        vision_config={**VISION, **sizes, "out_hidden_size": base.config.hidden_size},
        image_token_id=len(tiny.WORDS),
        tie_word_embeddings=False,
        eos_token_id=base.config.eos_token_id,
        pad_token_id=base.config.pad_token_id,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    return model


def align(model: Qwen2_5_VLForConditionalGeneration, images: ImagesByDigit, steps: int = 100, batch: int = 64) -> None:
    """Train the vision tower to turn the image of a digit into the embedding of its word."""
    tower = model.model.visual
    words = model.get_input_embeddings().weight[[tiny.WORDS.index(str(digit)) for digit in range(10)]].detach()
    pixels = torch.stack([image for digit in images for image in digit])
    digits = torch.tensor([digit for digit in range(10) for _ in images[digit]])
    grid = torch.tensor([[1, GRID, GRID]] * batch)
    optimizer = FusedDriftAdamW(tower.parameters(), lr=3e-3)
    for _ in range(steps):
        drawn = torch.randint(len(pixels), (batch,))
        seen = tower(patches(pixels[drawn]), grid).pooler_output
        (seen - words[digits[drawn]]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def write_files(folder: Path, seed: int = 0) -> None:
    """Write `vlm/` with its processor, `expert/`, which is text-only, and `prior/`, built from the two."""
    model = new_model(seed)
    align(model, DigitImages(0, TEST_IMAGES).train)
    model.save_pretrained(folder / "vlm")
    processor().save_pretrained(folder / "vlm")
    tiny.base_and_expert()[1].save_pretrained(folder / "expert")
    build_prior(folder / "expert", folder / "vlm", folder / "prior", dtype=torch.float32)


# The sums


def conversation(pair: tiny.Pair, images: ImagesByDigit, rng: random.Random) -> dict[str, Any]:
    """A conversation with a randomly drawn image for each of the two digits."""
    image, (_, plus, _, *end) = {"type": "image", "text": None}, tiny.text(pair)[0].split(" ")
    question = [image, {"type": "text", "text": f" {plus} "}, image, {"type": "text", "text": f" {' '.join(end)}"}]
    return {
        "images": [picture(rng.choice(images[digit])) for digit in pair],
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": tiny.text(pair)[1]}]}],
    }


def picture(image: Tensor) -> Image.Image:
    """A grayscale image with pixels from 0 to 16, as in scikit-learn's digits."""
    return Image.fromarray(((image + 1) * 8).round().byte().numpy())


@torch.no_grad()
def held_out(trainer: SFTTrainer) -> tuple[float, float]:
    """Return the loss and the share of right answers, for held-out pairs and images never trained on."""
    images, rng = DigitImages(0, TEST_IMAGES).test, random.Random(5)
    batch = trainer.data_collator([conversation(pair, images, rng) for pair in tiny.halves()[1] * 4])
    return float(trainer.model.eval()(**batch).loss), tiny.share_right(trainer.model, batch)


# The fine-tuning


def build(
    with_prior: bool,
    folder: Path,
    steps: int = STEPS,
    adapters: bool = False,
    tower: bool = False,
    seed: int = 0,
    **options: Any,
) -> SFTTrainer:
    """An SFTTrainer of the weights, or of adapters, in the language model, or with `tower` everywhere.

    `folder` has the files of `write_files`; `options` are passed to use_drift.
    """
    images, rng = DigitImages(0, TEST_IMAGES).train, random.Random(seed)
    run = {**arguments(folder / "run", steps), "learning_rate": ADAPTERS_LR if adapters else LR}
    trainer = SFTTrainer(
        model=str(folder / "vlm"),
        args=SFTConfig(**run, seed=seed, bf16=False),
        processing_class=Processor.from_pretrained(folder / "vlm"),
        train_dataset=Dataset.from_list(
            [conversation(pair, images, rng) for pair in tiny.training_pairs(steps * tiny.BATCH_SIZE)]
        ),
        peft_config=LoraConfig(**LORA if tower else {**LORA, "target_modules": LANGUAGE}) if adapters else None,
    )
    if not tower:
        for name, param in trainer.model.named_parameters():
            param.requires_grad_(param.requires_grad and ".visual." not in name)
    trainer.remove_callback(PrinterCallback)
    use_drift(trainer, prior=folder / "prior" if with_prior else None, **{**OPTIONS, **options})
    return trainer


if __name__ == "__main__":
    quiet()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        for adapters in (False, True):
            print("LoRA" if adapters else "all weights")
            for with_prior in (False, True):
                trainer = build(with_prior, folder, adapters=adapters)
                trainer.train()
                loss, right = held_out(trainer)
                print(
                    f"held-out sums {'with the' if with_prior else 'without'} prior: loss {loss:.3f}, right {right:.0%}"
                )
        print("Added to the logs, first and last entry:", *figures(trainer), sep="\n")
