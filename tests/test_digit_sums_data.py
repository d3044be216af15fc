"""examples/digit_sums: its data, its batches, and the initial models."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")

from examples.digit_sums import data, qwen2_5_vl
from examples.digit_sums.families import FAMILIES, with_language_model


def test_pairs_are_halved_with_their_mirrors():
    seen, held_out = map(set, data.split_pairs(random.Random(7)))
    assert abs(len(seen) - len(held_out)) <= 2
    assert seen | held_out == set(data.ALL_PAIRS)
    assert not seen & held_out
    assert {(b, a) for a, b in seen} == seen


def test_test_images_are_unseen():
    images = data.DigitImages(seed=3, n_test=500)
    train, test = ({id(image) for digit in part for image in digit} for part in (images.train, images.test))
    assert (len(train), len(test), len(train & test)) == (1297, 500, 0)
    assert all(len(digit) > 20 for digit in images.test)
    assert all(image.shape == (8, 8) and -1 <= image.min() < image.max() <= 1 for image in images.test[4])


def test_what_is_tested_was_not_trained_on():
    found = data.SeedData.of(5, 200, 60, 60, 500)
    assert found is data.SeedData.of(5, 200, 60, 60, 500)
    assert [len(part) for part in (found.readings, found.tuning_sums, found.single_digits)] == [250, 60, 60]
    assert {example.digits for example in found.tuning_sums} == {example.digits for example in found.seen_sums}
    assert not {example.digits for example in found.held_out_sums} & {example.digits for example in found.tuning_sums}
    trained, tested = (
        {id(image) for part in parts for example in part for image in example.images}
        for parts in (
            (found.readings, found.tuning_sums),
            (found.seen_sums, found.held_out_sums, found.single_digits),
        )
    )
    assert not trained & tested


def test_wrong_sums_are_wrong_and_nothing_else_changes():
    sums = data.SeedData.of(5, 200, 60, 60, 500).tuning_sums
    noisy = data.with_wrong_sums(sums, 0.3, random.Random(1))
    changed = [(a, b) for a, b in zip(sums, noisy, strict=True) if a != b]
    assert len(changed) == 18
    for right, wrong in changed:
        assert wrong.answer.partition("=")[0] == right.answer.partition("=")[0]
        assert int(wrong.answer.partition("=")[2]) in set(data.SUMS) - {sum(right.digits)}
        assert (wrong.digits, wrong.images) == (right.digits, right.images)
    assert data.with_wrong_sums(sums, 0.0, random.Random(1)) == sums


def test_text_batch():
    batch = data.collate([data.Example((3, 7), "3+7=10"), data.Example((3, 4), "3+4=7")], qwen2_5_vl)
    first, second = batch["input_ids"].tolist()
    assert data.decode(first) == "37,3+7=10"
    assert second == [*data.encode("34,3+4=7"), data.TOKEN_ID[data.EOS], data.TOKEN_ID[data.PAD]]
    assert batch["labels"].tolist()[1] == [-100] * 3 + second[3:-1] + [-100]
    assert batch["attention_mask"].tolist()[1] == [1] * 9 + [0]


@pytest.mark.parametrize("name", FAMILIES)
def test_image_batch_and_prompts(name: str):
    family, images = FAMILIES[name], data.DigitImages(seed=0, n_test=500)
    examples = data.image_examples([(3, 7), (9, 9)], images.train, 3, data.chain, random.Random(0))
    examples += data.image_examples([(4,)], images.train, 1, data.reading, random.Random(0))
    assert [example.answer for example in examples] == ["3+7=10", "9+9=18", "3+7=10", "4"]
    batch = data.collate(examples, family)
    tokens = family.IMAGE_PROMPT.count(data.IMAGE)
    assert (batch["input_ids"] == data.TOKEN_ID[data.IMAGE]).sum() == 7 * tokens
    assert batch["pixel_values"].numel() == 7 * 64
    prompts = data.collate(examples[:3], family, with_answers=False)
    assert "labels" not in prompts
    assert prompts["input_ids"].shape[1] == batch["input_ids"].shape[1] - data.LONGEST_ANSWER


def test_patches_are_the_quarters_of_an_image():
    image = torch.rand(8, 8)
    quarters = [image[:4, :4], image[:4, 4:], image[4:, :4], image[4:, 4:]]
    assert torch.equal(qwen2_5_vl.patches(image[None]), torch.stack([quarter.flatten() for quarter in quarters]))


@pytest.mark.parametrize("name", FAMILIES)
def test_reader_starts_as_the_base_and_sees_the_images(name: str):
    family = FAMILIES[name]
    base = family.text_model(seed=0)
    reader = with_language_model(family, base, seed=1).eval()
    text = data.collate([data.Example((3, 7), "3+7")], family)
    torch.testing.assert_close(reader(**text).logits, base(**text).logits, rtol=1e-4, atol=1e-5)

    images = data.DigitImages(seed=0, n_test=500)
    one, other = data.image_examples([(3, 7), (3, 8)], images.train, 2, data.reading, random.Random(0))
    changed = replace(one, images=(one.images[0], other.images[1]))
    a, b = (reader(**data.collate([example], family)).logits[0] for example in (one, changed))
    prompt = one.prompt(family.IMAGE_PROMPT)
    second_image = max(i for i, token in enumerate(prompt) if token == data.IMAGE)
    first_of_it = second_image - family.IMAGE_PROMPT.count(data.IMAGE) + 1
    assert torch.equal(a[:first_of_it], b[:first_of_it])
    assert not torch.allclose(a[second_image], b[second_image])
