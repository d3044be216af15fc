"""Digits to read, sums to do: the images, the texts about them, and the batches that Qwen2 and Qwen2.5-VL take.

Every example asks about two digits. They are given as text ("37,") or as two images; the answer is their reading
("3+7") or a chain that ends in their sum ("3+7=10").
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

Pair = tuple[int, int]
ImagesByDigit = list[list[Tensor]]

PAD, EOS, VISION_START, IMAGE, VISION_END = "<pad>", "<eos>", "<vision_start>", "<image>", "<vision_end>"
TOKENS = (PAD, EOS, VISION_START, IMAGE, VISION_END, *",+=0123456789")
TOKEN_ID = {token: index for index, token in enumerate(TOKENS)}
LONGEST_ANSWER = len([*"9+9=18", EOS])

IMAGE_SIZE, PATCH_SIZE, MERGE_SIZE = 8, 4, 2  # pixels, pixels, patches that become one token
GRID = IMAGE_SIZE // PATCH_SIZE
IMAGE_PROMPT = (VISION_START, *[IMAGE] * (GRID // MERGE_SIZE) ** 2, VISION_END)

ALL_PAIRS: tuple[Pair, ...] = tuple(itertools.product(range(10), repeat=2))

# transformers 5 finds the images of a prompt by token types, transformers 4 by the vision tokens; it rejects the types.
_TAKES_TOKEN_TYPES = "mm_token_type_ids" in inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters


@dataclass(frozen=True)
class Example:
    """A question and its answer. `images` is empty for a text question, else two float32 [8, 8], in -1..1."""

    pair: Pair
    answer: str
    images: tuple[Tensor, ...] = field(default=(), repr=False)

    @property
    def prompt(self) -> list[str]:
        shown = [IMAGE_PROMPT] * len(self.images) or map(str, self.pair)
        return [*itertools.chain.from_iterable(shown), ","]


def reading(pair: Pair) -> str:
    """What is seen: "3+7"."""
    return f"{pair[0]}+{pair[1]}"


def chain(pair: Pair) -> str:
    """First what is seen, then the result: "3+7=10"."""
    return f"{reading(pair)}={sum(pair)}"


class DigitImages:
    """scikit-learn's 1,797 handwritten digits, `n_test` of them set aside: `train` and `test`, lists by digit."""

    def __init__(self, seed: int, n_test: int) -> None:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float() / 8 - 1
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()

        def by_digit(chosen: list[int]) -> ImagesByDigit:
            return [[images[i] for i in chosen if digits.target[i] == digit] for digit in range(10)]

        self.test = by_digit(order[:n_test])
        self.train = by_digit(order[n_test:])


def split_pairs(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Half of the 100 pairs to be seen, half to be held out. 3+7 stays with 7+3: neither gives the other away."""
    unordered = [(a, b) for a, b in ALL_PAIRS if a <= b]
    rng.shuffle(unordered)
    seen: set[Pair] = set()
    for a, b in unordered:
        if len(seen) < len(ALL_PAIRS) // 2:
            seen |= {(a, b), (b, a)}
    return sorted(seen), sorted(set(ALL_PAIRS) - seen)


def text_examples(answer: Callable[[Pair], str]) -> list[Example]:
    """All 100 pairs, given as text; `answer` is `reading` or `chain`."""
    return [Example(pair, answer(pair)) for pair in ALL_PAIRS]


def image_examples(
    pairs: Sequence[Pair], images: ImagesByDigit, count: int, answer: Callable[[Pair], str], rng: random.Random
) -> list[Example]:
    """`count` examples that go round the pairs evenly, each with images drawn at random."""
    shown = itertools.islice(itertools.cycle(pairs), count)
    return [Example(pair, answer(pair), tuple(rng.choice(images[digit]) for digit in pair)) for pair in shown]


def collate(examples: Sequence[Example], with_answers: bool = True) -> dict[str, Tensor]:
    """A batch for `model(**batch)`, or `with_answers=False` the prompts alone, for `model.generate(**batch)`.

    Returns int64 `input_ids` and `attention_mask` [examples, length], padded on the right, and `labels` for the
    answers; with images also float32 `pixel_values` [patches, pixels of a patch] and int64 `image_grid_thw`
    [images, 3].
    """
    prompts = [encode(example.prompt) for example in examples]
    answers = [encode([*example.answer, EOS]) if with_answers else [] for example in examples]
    rows = list(zip(prompts, answers, strict=True))
    batch = {
        "input_ids": _pad([prompt + answer for prompt, answer in rows], TOKEN_ID[PAD]),
        "attention_mask": _pad([[1] * len(prompt + answer) for prompt, answer in rows], 0),
    }
    if with_answers:
        batch["labels"] = _pad([[-100] * len(prompt) + answer for prompt, answer in rows], -100)
    images = [image for example in examples for image in example.images]
    if images:
        batch["pixel_values"] = patches(torch.stack(images))
        batch["image_grid_thw"] = torch.tensor([[1, GRID, GRID]] * len(images))
        if _TAKES_TOKEN_TYPES:
            batch["mm_token_type_ids"] = (batch["input_ids"] == TOKEN_ID[IMAGE]).int()
    return batch


def encode(tokens: Iterable[str]) -> list[int]:
    return [TOKEN_ID[token] for token in tokens]


def decode(ids: Iterable[int]) -> str:
    """The text before the first end token."""
    return "".join(itertools.takewhile(lambda token: token != EOS, (TOKENS[i] for i in ids)))


def patches(images: Tensor) -> Tensor:
    """Cut images [n, 8, 8] into the rows that Qwen2.5-VL's vision tower takes: patches that it merges lie together."""
    groups = GRID // MERGE_SIZE
    grid = images.reshape(-1, groups, MERGE_SIZE, PATCH_SIZE, groups, MERGE_SIZE, PATCH_SIZE)
    return grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, PATCH_SIZE * PATCH_SIZE)


def _pad(rows: list[list[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
