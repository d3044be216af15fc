"""examples/digit_sums: its data, its batches, and the whole of it at a size that proves nothing but that it runs."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

from drift_kernels import Prior
from drift_kernels.integrations.peft import lora_prior
from drift_kernels.prior.names import canonical_name

pytest.importorskip("sklearn")
pytest.importorskip("peft")

from examples.digit_sums import data, figures, ranks, report
from examples.digit_sums.experiment import SeedRun, share_read, share_right
from examples.digit_sums.models import multimodal_model, text_model
from examples.digit_sums.parallel import prepare_process
from examples.digit_sums.priors import drift_prior, merge
from examples.digit_sums.settings import ARMS, Arm, Settings, Stage

TINY = Settings(
    base=Stage(3, 1e-3),
    expert=Stage(3, 1e-3),
    reader=Stage(3, 1e-3),
    tuning=Stage(10, 1e-3, batch_size=4),
    adapters=Stage(20, 1e-2, batch_size=4),
    reader_examples=32,
    tuning_examples=32,
    test_examples=20,
)
TINY_ARMS = (
    Arm("merge", tuned=False, merge=1.0),
    Arm("SFT"),
    Arm("SFT again"),
    Arm("gradnorm, annealed", scaling="gradnorm", alpha=1.0, anneal=0.5),
    Arm("decoupled", scaling="decoupled", alpha=10.0),
    Arm("LoRA: SFT", rank=4),
    Arm("LoRA: decoupled", rank=4, scaling="decoupled", alpha=10.0),
    Arm("LoRA along the prior: decoupled", rank=4, scaling="decoupled", alpha=10.0, along=True),
    Arm("gradnorm, rank 8", scaling="gradnorm", alpha=1.0, anneal=0.5, prior_rank=8),
)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory):
    threads = torch.get_num_threads()
    prepare_process()
    steps: list[str] = []
    run = SeedRun(0, TINY, tmp_path_factory.mktemp("seed-0"), steps.append)
    record = run.run(TINY_ARMS)
    yield run, record, steps
    torch.set_num_threads(threads)


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


def test_text_batch():
    batch = data.collate([data.Example((3, 7), "3+7=10"), data.Example((3, 4), "3+4=7")])
    first, second = batch["input_ids"].tolist()
    assert data.decode(first) == "37,3+7=10"
    assert second == [*data.encode("34,3+4=7"), data.TOKEN_ID[data.EOS], data.TOKEN_ID[data.PAD]]
    assert batch["labels"].tolist()[1] == [-100] * 3 + second[3:-1] + [-100]
    assert batch["attention_mask"].tolist()[1] == [1] * 9 + [0]


def test_image_batch_and_prompts():
    images = data.DigitImages(seed=0, n_test=500)
    examples = data.image_examples([(3, 7), (9, 9)], images.train, 3, data.chain, random.Random(0))
    assert [example.answer for example in examples] == ["3+7=10", "9+9=18", "3+7=10"]
    batch = data.collate(examples)
    assert (batch["input_ids"] == data.TOKEN_ID[data.IMAGE]).sum() == len(batch["image_grid_thw"]) == 6
    assert len(batch["pixel_values"]) == batch["image_grid_thw"].prod(1).sum()
    prompts = data.collate(examples, with_answers=False)
    assert "labels" not in prompts
    assert prompts["input_ids"].shape[1] == batch["input_ids"].shape[1] - data.LONGEST_ANSWER


def test_patches_are_the_quarters_of_an_image():
    image = torch.rand(8, 8)
    quarters = [image[:4, :4], image[:4, 4:], image[4:, :4], image[4:, 4:]]
    assert torch.equal(data.patches(image[None]), torch.stack([quarter.flatten() for quarter in quarters]))


def test_reader_starts_as_the_base_and_sees_the_images():
    base = text_model(seed=0)
    reader = multimodal_model(base, seed=1).eval()
    text = data.collate([data.Example((3, 7), "3+7")])
    torch.testing.assert_close(reader(**text).logits, base(**text).logits, rtol=1e-4, atol=1e-5)

    images = data.DigitImages(seed=0, n_test=500)
    one, other = data.image_examples([(3, 7), (3, 8)], images.train, 2, data.reading, random.Random(0))
    changed = replace(one, images=(one.images[0], other.images[1]))
    a, b = (reader(**data.collate([example])).logits[0] for example in (one, changed))
    second_image = one.prompt.index(data.VISION_END) + 2
    assert torch.equal(a[:second_image], b[:second_image])
    assert not torch.allclose(a[second_image], b[second_image])


def test_scores():
    examples = [data.Example((3, 7), "3+7=10"), data.Example((1, 2), "1+2=3")]
    said = ["3+7=11", "1+2"]
    assert share_right(said, examples) == 0
    assert share_read(said, examples) == 1
    assert share_right(["3+7=10", "1+3=3"], examples) == share_read(["3+7=10", "1+3=3"], examples) == 0.5


def test_prior_of_the_run_binds_completely(tiny_run):
    run, _, _ = tiny_run
    reader = Qwen2_5_VLForConditionalGeneration.from_pretrained(run.folder / "reader")
    coverage = Prior.open(run.folder / "prior").match(reader.named_parameters(), strict=True)
    assert len(coverage.matched) > 4 * 7  # the biases of q, k and v are matched too
    assert all("language_model.layers" in name for name in coverage.matched)


def test_a_prior_of_low_rank_says_what_it_keeps(tiny_run):
    run, record, _ = tiny_run
    whole, low = (Prior.open(run.folder / name) for name in ("prior", "prior_8"))
    kept = sum(
        float((torch.linalg.svdvals(whole.load(n).double())[:8] ** 2).sum()) for n in whole.names if n[-1] == "t"
    )
    kept += sum(float((whole.load(name).double() ** 2).sum()) for name in whole.names if name.endswith("bias"))
    energy = sum(whole.info(name).delta_norm ** 2 for name in whole.names)
    assert record["kept_energy"] == {8: pytest.approx(kept / energy, rel=1e-2)}
    assert low.names == whole.names


def test_merge_adds_the_task_vector(tiny_run):
    run, _, _ = tiny_run
    reader = Qwen2_5_VLForConditionalGeneration.from_pretrained(run.folder / "reader")
    before = reader.model.language_model.layers[2].mlp.up_proj.weight.detach().clone()
    merge(reader, run.folder / "task_vector", 0.5)
    expert, base = (
        Qwen2ForCausalLM.from_pretrained(run.folder / name).model.layers[2].mlp.up_proj.weight
        for name in ("expert", "base")
    )
    added = reader.model.language_model.layers[2].mlp.up_proj.weight - before
    torch.testing.assert_close(added, 0.5 * (expert - base), rtol=1e-2, atol=1e-6)  # the vector is stored in bf16


def test_arms_share_start_and_order(tiny_run):
    _, record, steps = tiny_run
    losses = {name: arm["loss"] for name, arm in record["arms"].items()}
    assert losses["merge"] == []
    assert losses["SFT"] == losses["SFT again"]
    assert losses["SFT"] != losses["gradnorm, annealed"] != losses["decoupled"] != losses["SFT"]
    assert losses["gradnorm, rank 8"] != losses["gradnorm, annealed"]
    assert steps.count("decoupled") == TINY.tuning.steps
    assert steps.count("LoRA: SFT") == TINY.adapters.steps
    assert len(steps) == TINY.total_steps(TINY_ARMS)
    of_adapters = [curve for name, curve in losses.items() if "LoRA" in name]
    assert len({str(curve) for curve in of_adapters}) == len(of_adapters) == 3


def test_adapters_end_in_the_language_model_alone(tiny_run):
    run, _, _ = tiny_run
    reader = Qwen2_5_VLForConditionalGeneration.from_pretrained(run.folder / "reader")
    before = {name: param.detach().clone() for name, param in reader.named_parameters()}
    run._tune(reader, Arm("LoRA", rank=4, scaling="decoupled", alpha=10.0, along=True))
    assert reader.state_dict().keys() == before.keys()
    changed = {name for name, param in reader.named_parameters() if not torch.equal(param, before[name])}
    assert changed == {name for name in before if "language_model.layers" in name and name.endswith("_proj.weight")}
    drift = (
        reader.model.language_model.layers[1].mlp.up_proj.weight
        - before["model.language_model.layers.1.mlp.up_proj.weight"]
    )
    assert torch.linalg.matrix_rank(drift.detach().double(), rtol=1e-4) == 4


def test_adapters_begin_along_the_prior(tiny_run):
    run, _, _ = tiny_run
    reader = Qwen2_5_VLForConditionalGeneration.from_pretrained(run.folder / "reader")
    model = run._with_adapters(reader, run.folder / "prior", Arm("LoRA", rank=4, along=True))
    prior = lora_prior(model, run.folder / "prior")
    assert len(prior.adapters) == 4 * 7
    for adapter in prior.adapters:
        a, b = adapter.params()
        delta = prior.prior.load(canonical_name(adapter.weight)).double()
        rows = torch.linalg.qr(a.detach().double().T).Q
        best = float((torch.linalg.svdvals(delta)[:4] ** 2).sum())
        assert float((delta @ rows).norm() ** 2) == pytest.approx(best, rel=0.02)
        assert a.requires_grad
        assert not b.any()


def test_report(tiny_run, tmp_path: Path):
    _, record, _ = tiny_run
    records = [record, record]
    summary = report.summarize(records, TINY_ARMS)
    assert summary["arms"]["SFT"]["reading"] == {"mean": record["arms"]["SFT"]["scores"]["reading"], "std": 0}
    assert report.table(summary, TINY_ARMS, 2).row_count == len(TINY_ARMS)
    report.write_json(tmp_path / "results.json", TINY, TINY_ARMS, records, summary, 1.5)
    assert json.loads((tmp_path / "results.json").read_text())["seeds"][0]["seed"] == 0
    figures.draw_loss(tmp_path / "loss.png", records, TINY_ARMS)
    figures.draw_trade_off(tmp_path / "trade_off.png", records, TINY_ARMS)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("loss.png", "trade_off.png"))


def test_table_by_rank():
    arms = [ranks.ranked(arm, rank) for arm in ARMS if arm.name in ranks.NAMES for rank in ranks.RANKS]
    assert len({arm.name for arm in arms}) == len(arms) == len(ranks.NAMES) * len(ranks.RANKS)
    assert {arm.prior_rank for arm in arms} == set(ranks.RANKS)
    score = {"held_out_sums": 0.5, "seen_sums": 0.9, "reading": 0.8}
    record = {"kept_energy": {4: 0.6, 8: 0.8, 16: 0.9, 32: 0.98}, "expert": 1.0}
    record["arms"] = {arm.name: {"scores": score} for arm in arms}
    table = ranks.table([record], report.summarize([record], arms)["arms"])
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows[0] == ("4", "60.0", "50.0", "80.0", "50.0", "80.0")
    assert rows[-1][:2] == ("full", "100.0")


def test_drift_prior_failure_says_why(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"drift-prior inspect .* failed:\n.*not a prior"):
        drift_prior("inspect", tmp_path)


def test_arm_names_are_unique():
    assert len({arm.name for arm in ARMS}) == len(ARMS)


def test_the_short_run_has_one_arm_with_adapters():
    short = [arm for arm in ARMS if arm.in_short]
    assert [arm.along for arm in short if arm.rank is not None] == [True]
    assert sum(arm.tuned for arm in short) == 7
