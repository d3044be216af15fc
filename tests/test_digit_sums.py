"""examples/digit_sums: its data, its models, and single runs, too small to show more than that they run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from drift_kernels import Prior, PriorMismatchError
from drift_kernels.integrations.peft import lora_prior
from drift_kernels.prior.names import canonical_name

pytest.importorskip("sklearn")
pytest.importorskip("peft")

from examples.digit_sums import data, llava
from examples.digit_sums.checkpoints import Checkpoints
from examples.digit_sums.families import FAMILIES
from examples.digit_sums.parallel import quiet
from examples.digit_sums.priors import add, drift_prior, random_direction
from examples.digit_sums.run import Runner, stage_of
from examples.digit_sums.settings import Arm, Run, Settings, Stage, World
from examples.digit_sums.train import share_read, share_right

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
CLEAN = World()
ARMS = {
    "merge": Arm(tuned=False, merge=1.0),
    "SFT": Arm(),
    "SFT at another rate": Arm(lr=2e-3),
    "gradnorm, annealed": Arm(scaling="gradnorm", alpha=1.0, anneal=0.5),
    "gradnorm": Arm(scaling="gradnorm", alpha=1.0),
    "gradnorm, anchor": Arm(scaling="gradnorm", alpha=1.0, anchor=True),
    "attention": Arm(scaling="gradnorm", alpha=1.0, modules="attn"),
    "random": Arm(scaling="gradnorm", alpha=1.0, random=True),
    "rank 8": Arm(scaling="gradnorm", alpha=1.0, prior_rank=8),
    "LoRA: SFT": Arm(rank=4),
    "LoRA: decoupled": Arm(rank=4, scaling="decoupled", alpha=10.0),
    "LoRA along the prior": Arm(rank=4, scaling="decoupled", alpha=10.0, along=True),
}


def runner(root: Path, arm: Arm, world: World = CLEAN, steps: list[str] | None = None) -> Runner:
    return Runner(Run(0, world, arm), TINY, root, lambda what: steps.append(what) if steps is not None else None)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    quiet()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digit_sums")


@pytest.fixture(scope="module")
def records(root: Path):
    return {name: runner(root, arm).record() for name, arm in ARMS.items()}


def test_scores():
    examples = [data.Example((3, 7), "3+7=10"), data.Example((1, 2), "1+2=3")]
    said = ["3+7=11", "1+2"]
    assert share_right(said, examples) == 0
    assert share_read(said, examples) == 1
    assert share_right(["3+7=10", "1+3=3"], examples) == share_read(["3+7=10", "1+3=3"], examples) == 0.5


def test_a_single_digit_is_scored_with_and_without_what_follows(root: Path, monkeypatch: pytest.MonkeyPatch):
    one = runner(root, Arm())
    said = {1: [f"{example.digits[0]}+1" for example in one.data.single_digits]}
    said[1][0] = one.data.single_digits[0].answer
    monkeypatch.setattr(
        "examples.digit_sums.run.answers",
        lambda model, examples, family: said.get(len(examples[0].digits), [""] * len(examples)),
    )
    scores = one.scores(None)
    assert scores == {
        "held_out_sums": 0,
        "seen_sums": 0,
        "reading": 0,
        "single_digits": 1,
        "single_answers": 1 / TINY.test_examples,
    }


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("modules", ["default", "attn", "mlp"])
def test_priors_bind_completely(root: Path, name: str, modules: str):
    made = runner(root, Arm(), World(name)).checkpoints
    reader = made.family.MODEL.from_pretrained(made.reader())
    coverage = Prior.open(made.prior(modules)).match(reader.named_parameters(), strict=True)
    biases = 3 if name == "qwen2_5_vl" else 0
    assert len(coverage.matched) == 4 * {"default": 7 + biases, "attn": 4 + biases, "mlp": 3}[modules]
    assert all("language_model.layers" in matched for matched in coverage.matched)


def test_a_prior_of_low_rank_says_what_it_keeps(root: Path, records):
    made = runner(root, Arm()).checkpoints
    whole, low = Prior.open(made.prior()), Prior.open(made.prior(rank=8))
    kept = sum(
        float((torch.linalg.svdvals(whole.load(n).double())[:8] ** 2).sum()) for n in whole.names if n[-1] == "t"
    )
    kept += sum(float((whole.load(name).double() ** 2).sum()) for name in whole.names if name.endswith("bias"))
    energy = sum(whole.info(name).delta_norm ** 2 for name in whole.names)
    assert records["rank 8"]["kept_energy"] == pytest.approx(kept / energy, rel=1e-2)
    assert "kept_energy" not in records["gradnorm"]
    assert low.names == whole.names


def test_merges_add_what_they_say(root: Path):
    """Compared with the checkpoints. TIES at density 1, without sign conflicts, is the mean of the two."""
    made = runner(root, Arm()).checkpoints
    expert, base = (
        Qwen2ForCausalLM.from_pretrained(path).model.layers[2].mlp.up_proj.weight.detach()
        for path in (made.expert(), made.base())
    )
    start = made.family.MODEL.from_pretrained(made.reader()).model.language_model.layers[2].mlp.up_proj.weight.detach()

    def merged(**how: object) -> torch.Tensor:
        one = runner(root, Arm(tuned=False, **how))
        model = made.family.MODEL.from_pretrained(made.reader())
        one.merge(model)
        return model.model.language_model.layers[2].mlp.up_proj.weight.detach()

    torch.testing.assert_close(merged(merge=0.5), start + 0.5 * (expert - base), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(merged(merge=1.0, vector="way"), expert, rtol=1e-5, atol=3e-5)  # stored in bf16
    vectors = torch.stack([expert - base, start - base])
    agreed = (vectors.sign() == vectors.sum(0).sign()) & (vectors != 0)
    ties = (vectors * agreed).sum(0) / agreed.sum(0).clamp(min=1)
    torch.testing.assert_close(merged(merge=1.5, vector="ties"), base + 1.5 * ties, rtol=1e-5, atol=1e-6)
    assert not torch.equal(merged(merge=1.5, vector="ties", density=0.2), merged(merge=1.5, vector="ties"))
    assert torch.equal(merged(), start)


def test_a_random_direction_has_the_norms_of_the_prior(root: Path):
    prior = runner(root, Arm()).checkpoints.prior()
    deltas, stored = random_direction(prior, seed=3), Prior.open(prior)
    assert deltas.keys() == set(stored.names)
    for name, delta in deltas.items():
        truth = stored.load(name)
        assert float(delta.norm()) == pytest.approx(float(truth.norm()), rel=1e-5)
        if truth.numel() > 1000:
            assert abs(float(torch.cosine_similarity(delta.flatten(), truth.flatten(), dim=0))) < 0.1


def test_arms_share_start_and_order_and_differ_otherwise(root: Path, records):
    losses = {name: record["loss"] for name, record in records.items()}
    assert losses["merge"] == []
    assert runner(root, ARMS["SFT"]).record() == records["SFT"]
    assert len({str(curve) for curve in losses.values()}) == len(losses)
    assert all(set(record["scores"].values()) <= {n / 40 for n in range(41)} for record in records.values())


def test_arms_see_the_same_batches(root: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    def noted(examples: Sequence[data.Example], *arguments: object, **options: object) -> dict[str, torch.Tensor]:
        seen.append(hash(tuple((example.answer, *map(id, example.images)) for example in examples)))
        return data.collate(examples, *arguments, **options)

    monkeypatch.setattr("examples.digit_sums.train.collate", noted)
    batches = {}
    for name in ("SFT", "gradnorm, anchor", "merge, then SFT"):
        one = runner(root, ARMS.get(name, Arm(merge=1.0)))
        seen.clear()
        one.tune(one.family.MODEL.from_pretrained(one.checkpoints.reader()))
        batches[name] = list(seen)
    assert len(batches["SFT"]) >= TINY.tuning.steps
    assert len(set(batches["SFT"])) > 1
    assert batches["SFT"] == batches["gradnorm, anchor"] == batches["merge, then SFT"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.0}, "expected a scaling"),
        ({"anchor": True}, "expected a scaling"),
        ({"along": True}, "expected a rank"),
        ({"density": 0.5}, "expected the vector to be ties"),
        ({"scaling": "gradnorm", "alpha": 1.0, "random": True, "rank": 4}, "expected no rank"),
    ],
)
def test_arms_that_mean_nothing_are_refused(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Arm(**fields)


def test_the_world_reaches_the_run(root: Path, records):
    sft, prior = ARMS["SFT"], ARMS["gradnorm"]
    assert runner(root, sft, World(noise=0.5)).record()["loss"] != records["SFT"]["loss"]
    assert runner(root, prior, World(expert_steps=1)).record()["loss"] != records["gradnorm"]["loss"]
    assert runner(root, sft, World(expert_steps=1)).record() == records["SFT"]  # SFT does not use the expert
    assert runner(root, prior, World("llava")).record()["loss"] != records["gradnorm"]["loss"]


def test_steps_are_reported_and_foreseen(tmp_path: Path):
    steps: list[str] = []
    one = runner(tmp_path, ARMS["SFT"], steps=steps)
    assert sum(one.checkpoints.missing().values()) == 9
    one.record()
    assert {what: steps.count(what) for what in steps} == {"base": 3, "reader": 3, "fine-tuning": 10}
    assert stage_of(ARMS["SFT"], TINY).steps == 10
    assert stage_of(ARMS["LoRA: SFT"], TINY).steps == 20
    assert stage_of(ARMS["merge"], TINY).steps == 0
    assert stage_of(ARMS["SFT at another rate"], TINY).lr == 2e-3
    assert one.checkpoints.missing() == {
        one.checkpoints.folder / "expert_3": 3,
        one.checkpoints.folder / "expert_3_score.json": 0,
    }
    one.checkpoints.expert_score()
    assert one.checkpoints.missing() == {}


def test_adapters_end_in_the_language_model_alone(root: Path):
    one = runner(root, ARMS["LoRA along the prior"])
    reader = one.family.MODEL.from_pretrained(one.checkpoints.reader())
    before = {name: param.detach().clone() for name, param in reader.named_parameters()}
    one.tune(reader)
    assert reader.state_dict().keys() == before.keys()
    changed = {name for name, param in reader.named_parameters() if not torch.equal(param, before[name])}
    assert changed == {name for name in before if "language_model.layers" in name and name.endswith("_proj.weight")}
    drift = (
        reader.model.language_model.layers[1].mlp.up_proj.weight
        - before["model.language_model.layers.1.mlp.up_proj.weight"]
    )
    assert torch.linalg.matrix_rank(drift.detach().double(), rtol=1e-4) == 4


def test_adapters_begin_along_the_prior(root: Path):
    one = runner(root, ARMS["LoRA along the prior"])
    model = one.with_adapters(one.family.MODEL.from_pretrained(one.checkpoints.reader()))
    prior = lora_prior(model, one.prior())
    assert len(prior.adapters) == 4 * 7
    for adapter in prior.adapters:
        a, b = adapter.params()
        delta = prior.prior.load(canonical_name(adapter.weight)).double()
        rows = torch.linalg.qr(a.detach().double().T).Q
        best = float((torch.linalg.svdvals(delta)[:4] ** 2).sum())
        assert float((delta @ rows).norm() ** 2) == pytest.approx(best, rel=0.02)
        assert a.requires_grad
        assert not b.any()


def test_what_is_made_is_made_once_and_whole(tmp_path: Path):
    made = Checkpoints(0, TINY, CLEAN, tmp_path, lambda what: None)

    def stopped(out: Path) -> None:
        out.mkdir()
        (out / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made._once("thing", stopped)
    assert list(made.folder.iterdir()) == []

    def overtaken(out: Path) -> None:
        (made.folder / "thing").mkdir()
        (made.folder / "thing" / "of another process").touch()
        out.mkdir()

    assert made._once("thing", overtaken) == made.folder / "thing"
    assert [path.name for path in (made.folder / "thing").iterdir()] == ["of another process"]
    assert made._once("thing", stopped) == made.folder / "thing"
    assert [path.name for path in made.folder.iterdir()] == ["thing"]


def test_expert_score_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = Checkpoints(0, TINY, CLEAN, tmp_path, lambda what: None)
    score = made.expert_score()
    assert json.loads((made.folder / "expert_3_score.json").read_text()) == score
    monkeypatch.setattr("examples.digit_sums.checkpoints.answers", lambda *arguments: pytest.fail("asked again"))
    assert made.expert_score() == score


def test_drift_prior_failure_says_why(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"drift-prior inspect .* failed:\n.*not a prior"):
        drift_prior("inspect", tmp_path)


def test_add_refuses_a_vector_that_does_not_fit(root: Path):
    made = runner(root, Arm()).checkpoints
    with pytest.raises(PriorMismatchError, match="bias"):  # Llama has none
        add(llava.text_model(0), made.task_vector(), 1.0)
