"""Digits to read and to add: the images, the texts about them, and batches of them.

Most examples ask about two digits, given as text ("37,") or as two images; the answer is their reading ("3+7") or a
chain that ends in their sum ("3+7=10"). Others show one image and ask for its digit ("7").
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from torch import Tensor

if TYPE_CHECKING:
    from .families import Family

Pair = tuple[int, int]
Digits = tuple[int, ...]  # a pair, or a single digit
ImagesByDigit = list[list[Tensor]]

PAD, EOS, VISION_START, IMAGE, VISION_END = "<pad>", "<eos>", "<vision_start>", "<image>", "<vision_end>"
TOKENS = (PAD, EOS, VISION_START, IMAGE, VISION_END, *",+=0123456789")
TOKEN_ID = {token: index for index, token in enumerate(TOKENS)}
LONGEST_ANSWER = len([*"9+9=18", EOS])

IMAGE_SIZE = 8  # pixels

ALL_PAIRS: tuple[Pair, ...] = tuple(itertools.product(range(10), repeat=2))
SUMS = range(19)


@dataclass(frozen=True)
class Example:
    """A question and its answer. `images` is empty for a text question, else has a float32 [8, 8] in -1..1 per
    digit."""

    digits: Digits
    answer: str
    images: tuple[Tensor, ...] = field(default=(), repr=False)

    def prompt(self, image_prompt: Sequence[str]) -> list[str]:
        shown = [image_prompt] * len(self.images) or map(str, self.digits)
        return [*itertools.chain.from_iterable(shown), ","]


def reading(digits: Digits) -> str:
    """The digits seen: "3+7", or "7" for one image."""
    return "+".join(map(str, digits))


def chain(digits: Digits) -> str:
    """The digits seen, then the result: "3+7=10"."""
    return f"{reading(digits)}={sum(digits)}"


class DigitImages:
    """scikit-learn's 1,797 handwritten digits, `n_test` of them set aside: `train` and `test` are lists by digit."""

    def __init__(self, seed: int, n_test: int) -> None:
        digits = load_digits()
        images = torch.from_numpy(digits.images).float() / 8 - 1
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()

        def by_digit(chosen: list[int]) -> ImagesByDigit:
            return [[images[i] for i in chosen if digits.target[i] == digit] for digit in range(10)]

        self.test = by_digit(order[:n_test])
        self.train = by_digit(order[n_test:])


def split_pairs(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Split the 100 pairs into seen and held-out halves. 3+7 stays with 7+3, so that neither reveals the other."""
    unordered = [(a, b) for a, b in ALL_PAIRS if a <= b]
    rng.shuffle(unordered)
    seen: set[Pair] = set()
    for a, b in unordered:
        if len(seen) < len(ALL_PAIRS) // 2:
            seen |= {(a, b), (b, a)}
    return sorted(seen), sorted(set(ALL_PAIRS) - seen)


def text_examples(answer: Callable[[Digits], str]) -> list[Example]:
    """All 100 pairs as text; `answer` is `reading` or `chain`."""
    return [Example(pair, answer(pair)) for pair in ALL_PAIRS]


def image_examples(
    asked: Sequence[Digits], images: ImagesByDigit, count: int, answer: Callable[[Digits], str], rng: random.Random
) -> list[Example]:
    """`count` examples that cycle evenly through `asked`, each with randomly drawn images."""
    shown = itertools.islice(itertools.cycle(asked), count)
    return [Example(digits, answer(digits), tuple(rng.choice(images[digit]) for digit in digits)) for digits in shown]


def with_wrong_sums(examples: Sequence[Example], share: float, rng: random.Random) -> list[Example]:
    """The same examples, but a random `share` of them ends in a wrong sum."""
    wrong = set(rng.sample(range(len(examples)), round(share * len(examples))))
    return [_with_wrong_sum(example, rng) if i in wrong else example for i, example in enumerate(examples)]


def _with_wrong_sum(example: Example, rng: random.Random) -> Example:
    other = rng.choice([number for number in SUMS if number != sum(example.digits)])
    return replace(example, answer=f"{reading(example.digits)}={other}")


@dataclass(frozen=True)
class SeedData:
    """All examples of a seed, which determines the held-out pairs, the images set aside and all random draws."""

    readings: list[Example]  # the reader's training
    tuning_sums: list[Example]
    seen_sums: list[Example]
    held_out_sums: list[Example]
    single_digits: list[Example]

    @classmethod
    @functools.lru_cache(maxsize=2)
    def of(cls, seed: int, reader: int, tuning: int, test: int, test_images: int) -> SeedData:
        """Make the data of a seed. `reader`, `tuning` and `test` are numbers of examples."""
        images, rng = DigitImages(seed, test_images), random.Random(seed)
        seen, held_out = split_pairs(rng)
        singles = [(digit,) for digit in range(10)]
        return cls(
            readings=image_examples(ALL_PAIRS, images.train, reader, reading, rng)
            + image_examples(singles, images.train, reader // 4, reading, rng),
            tuning_sums=image_examples(seen, images.train, tuning, chain, rng),
            seen_sums=image_examples(seen, images.test, test, chain, rng),
            held_out_sums=image_examples(held_out, images.test, test, chain, rng),
            single_digits=image_examples(singles, images.test, test, reading, rng),
        )


def collate(examples: Sequence[Example], family: Family, with_answers: bool = True) -> dict[str, Tensor]:
    """Return a batch for `model(**batch)`, or with `with_answers=False` only the prompts, for
    `model.generate(**batch)`.

    It has int64 `input_ids` and `attention_mask` [examples, length], padded on the right, and `labels` for the answers;
    with images, also the family's image inputs.
    """
    prompts = [encode(example.prompt(family.IMAGE_PROMPT)) for example in examples]
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
        batch |= family.image_inputs(torch.stack(images), batch["input_ids"])
    return batch


def encode(tokens: Iterable[str]) -> list[int]:
    return [TOKEN_ID[token] for token in tokens]


def decode(ids: Iterable[int]) -> str:
    """The text before the first end token."""
    return "".join(itertools.takewhile(lambda token: token != EOS, (TOKENS[i] for i in ids)))


def _pad(rows: list[list[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
