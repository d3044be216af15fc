"""Prior: opening, loading, fingerprints, and matching against live parameters."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import text_weights, write_checkpoint
from torch import Tensor

from drift_kernels import Prior, PriorError, PriorFormatError, PriorMismatchError, build_prior
from drift_kernels.prior.norms import CHUNK, norm

UP, NORM = "layers.0.mlp.up_proj.weight", "norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "expert", text_weights())
    write_checkpoint(tmp_path / "base", text_weights(prefix="language_model.model."))
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", max_shard_bytes=20_000)
    assert len(list((tmp_path / "prior").glob("prior-*.safetensors"))) > 2
    return tmp_path / "prior"


def edit_record(folder: Path, **changes: object) -> None:
    record = json.loads((folder / "drift_prior.json").read_text())
    (folder / "drift_prior.json").write_text(json.dumps(record | changes))


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize("numel", [0, 1, 1023, CHUNK + 77])
def test_norm_is_that_of_float64(numel: int, scale: float) -> None:
    """Also of equal elements, where every rounding of a float32 sum errs in the same direction: the bound is that of a
    sum of CHUNK terms in float64."""
    for values in (torch.randn(numel) * scale, torch.full((numel,), 1.3 * scale)):
        expected = pytest.approx(math.sqrt(math.fsum(values.double().square().tolist())), rel=1e-10)
        assert norm(values) == norm(values.double()) == expected


def test_norm_is_the_same_for_any_number_of_threads() -> None:
    values, found, before = torch.randn(CHUNK + 77), set(), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(norm(values))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_norm_keeps_nan_and_inf() -> None:
    assert torch.tensor(norm(torch.tensor([1.0, float("nan")]))).isnan()
    assert norm(torch.tensor([1.0, float("-inf")])) == float("inf")


def test_mapping_accepts_live_and_canonical_names() -> None:
    deltas = {
        f"module.model.language_model.{UP}": torch.randn(3, 5),
        NORM: torch.randn(5),
        "projector.w": torch.ones(2),
    }
    prior = Prior.from_mapping(deltas)
    assert prior.names == (UP, NORM, "projector.w")
    assert prior.info(UP).shape == (3, 5)
    assert prior.info(UP).param_norm is prior.info(UP).cosine is None
    assert prior.info(NORM).delta_norm == pytest.approx(deltas[NORM].double().norm().item(), rel=1e-6)
    assert len(prior) == 3
    assert prior.numel == 22


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
    ],
)
def test_mapping_dtypes_and_memory(given: torch.dtype, kept: torch.dtype) -> None:
    delta = torch.randn(7, 4, dtype=torch.float32).to(given).t()
    prior = Prior.from_mapping({NORM: delta})
    loaded = prior.load(NORM)
    assert prior.info(NORM).dtype == loaded.dtype == kept
    assert loaded.is_contiguous()
    assert loaded.data_ptr() != delta.data_ptr()
    torch.testing.assert_close(loaded, delta.to(kept), rtol=0, atol=0)


def test_a_delta_in_memory_is_handed_out_itself_where_a_copy_is_not_asked_for() -> None:
    deltas = {NORM: torch.randn(7), UP: torch.randn(7, 4).t()}
    prior = Prior.from_mapping(deltas)
    assert prior.load(NORM, "cpu", copy=False).data_ptr() == deltas[NORM].data_ptr()
    assert prior.load(NORM, "cpu").data_ptr() != deltas[NORM].data_ptr()
    assert prior.load(UP, copy=False).is_contiguous()
    assert torch.equal(prior.load(UP, copy=False), deltas[UP])


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({}, "at least one delta"),
        ({UP: torch.zeros(2), f"model.{UP}": torch.zeros(2)}, f"two deltas have the canonical name {UP}"),
        (
            {UP: torch.zeros(2, dtype=torch.int64)},
            f"the delta of {UP} must be a dense floating-point tensor, got torch.int64",
        ),
        ({UP: torch.zeros(2, dtype=torch.complex64)}, "got torch.complex64"),
        ({UP: torch.eye(2).to_sparse()}, "got torch.float32 torch.sparse_coo"),
        ({UP: [1.0]}, "got list"),
        ({UP: torch.tensor([1.0, float("nan")])}, f"the delta of {UP} contains NaN or Inf"),
        ({UP: torch.tensor([1.0, 1e39], dtype=torch.float64)}, f"the delta of {UP} contains NaN or Inf"),
    ],
)
def test_mapping_rejects(mapping: dict[str, Tensor], words: str) -> None:
    with pytest.raises(PriorError, match=words):
        Prior.from_mapping(mapping)


@pytest.mark.parametrize("numel", [5, (1 << 20) + 3])
def test_fingerprint_of_a_mapping_follows_its_contents(numel: int) -> None:
    delta = torch.randn(numel)
    first = Prior.from_mapping({UP: delta}).fingerprint
    assert len(first) == 64
    assert Prior.from_mapping({f"model.{UP}": delta.clone()}).fingerprint == first
    changed = delta.clone()
    changed[-1] += 1
    others = [{UP: changed}, {NORM: delta}, {UP: delta[None]}, {UP: delta.bfloat16()}]
    assert first not in {Prior.from_mapping(other).fingerprint for other in others}


def test_open_and_load(folder: Path) -> None:
    prior = Prior.open(str(folder))
    for name in prior.names:
        delta, info = prior.load(name, device="cpu"), prior.info(name)
        assert delta.dtype == info.dtype == torch.bfloat16
        assert delta.is_contiguous()
        assert delta.data_ptr() % 64 == 0
        assert tuple(delta.shape) == info.shape
        assert info.delta_norm == pytest.approx(delta.double().norm().item(), rel=1e-6)
    with pytest.raises(KeyError):
        prior.load("nothing")


def test_a_prior_of_version_1_opens(folder: Path) -> None:
    expected = Prior.open(folder)
    record = json.loads((folder / "drift_prior.json").read_text())
    for row in record["tensors"].values():
        assert row.pop("stored_cosine") is None
    edit_record(folder, version=1, tensors=record["tensors"])
    prior = Prior.open(folder)
    assert prior.fingerprint == expected.fingerprint
    assert all(prior.info(name) == expected.info(name) for name in prior.names)
    assert torch.equal(prior.load(UP), expected.load(UP))


def test_a_prior_survives_copying_and_outlives_nothing_but_its_folder(folder: Path) -> None:
    prior = copy.deepcopy(Prior.open(folder))
    name = prior.names[0]
    assert torch.equal(prior.load(name), Prior.open(folder).load(name))
    shutil.rmtree(folder)
    with pytest.raises(PriorFormatError, match=name):
        prior.load(name)


def test_a_damaged_payload_is_noticed_and_named(folder: Path) -> None:
    prior = Prior.open(folder)
    name = prior.names[-1]
    shard = folder / json.loads((folder / "prior.safetensors.index.json").read_text())["weight_map"][name]
    content = bytearray(shard.read_bytes())
    for damage in (b"\x00\x40", b"\xc0\x7f"):  # 2.0, NaN
        content[-20:] = damage * 10
        shard.write_bytes(content)
        with pytest.raises(PriorFormatError, match=f"{name} is damaged: its checksum is"):
            prior.load(name)


@pytest.mark.parametrize("off", [-2e-5, -5e-6, 5e-6, 2e-5])
def test_a_norm_may_be_off_by_1e_5_of_the_recorded_one(folder: Path, off: float) -> None:
    """Machines add up in another order, which is far less."""
    tensors = json.loads((folder / "drift_prior.json").read_text())["tensors"]
    tensors[UP]["delta_norm"] *= 1 + off
    edit_record(folder, tensors=tensors)
    prior = Prior.open(folder)
    assert prior.verify().intact == (abs(off) < 1e-5)
    if abs(off) < 1e-5:
        prior.load(UP)
        return
    with pytest.raises(PriorFormatError, match=rf"{UP} is damaged: its norm is .*, recorded "):
        prior.load(UP)


def test_what_is_not_a_prior_does_not_open(folder: Path, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "no such folder"), (tmp_path / "base", "not a prior")):
        with pytest.raises(PriorFormatError, match=words):
            Prior.open(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"version": 4},
            "version 4 was written by a newer drift_kernels, but this one supports versions 1 to 3: upgrade",
        ),
        ({"version": 0}, "expected format 'drift_prior', version 1 to 3; found .* version 0"),
        ({"version": "2"}, "expected format 'drift_prior', version 1 to 3; found .* version '2'"),
        ({"format": "other"}, "found format 'other'"),
        ({"dtype": "float8"}, "float8"),
        ({"dtype": "float32"}, "is recorded as torch.float32"),
        ({"tensors": {}}, "disagree about"),
        ({"tensors": {UP: {"shape": [1]}}}, "delta_norm"),
        ({"sources": None}, "missing or invalid"),
    ],
)
def test_a_record_that_does_not_hold_is_noticed(folder: Path, changes: dict[str, object], words: str) -> None:
    edit_record(folder, **changes)
    with pytest.raises(PriorFormatError, match=words):
        Prior.open(folder)


def test_missing_and_truncated_shards_are_noticed(folder: Path) -> None:
    shard = sorted(folder.glob("prior-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(PriorFormatError, match=f"{shard.name}: truncated"):
        Prior.open(folder)
    shard.unlink()
    with pytest.raises(PriorFormatError, match=f"{shard.name} is missing, but listed in"):
        Prior.open(folder)
    shard.write_bytes(content)
    (folder / "drift_prior.json").write_text("{")
    with pytest.raises(PriorFormatError, match="cannot be read as JSON"):
        Prior.open(folder)


def test_match_reports_every_kind(caplog: pytest.LogCaptureFixture) -> None:
    prior = Prior.from_mapping(
        {UP: torch.ones(3, 5), NORM: torch.ones(5), "layers.1.mlp.up_proj.weight": torch.ones(3, 5)}
    )
    live = [(f"model.{UP}", torch.empty(3, 5)), (f"model.{NORM}", torch.empty(7)), ("visual.w", torch.empty(2))]
    coverage = prior.match(iter(live))
    assert coverage.matched == {f"model.{UP}": UP}
    assert coverage.shape_mismatches == [(f"model.{NORM}", NORM, (7,), (5,))]
    assert coverage.prior_only == ["layers.1.mlp.up_proj.weight"]
    assert coverage.model_only == ["visual.w"]
    assert caplog.records[0].levelno == logging.WARNING
    assert "1 of 3 deltas are bound" in caplog.text
    with pytest.raises(PriorMismatchError, match="only partially"):
        prior.match(live, strict=True)


def test_extra_parameters_are_no_mismatch(caplog: pytest.LogCaptureFixture) -> None:
    prior = Prior.from_mapping({UP: torch.ones(3, 5)})
    coverage = prior.match([(UP, torch.empty(3, 5)), ("visual.w", torch.empty(2))], strict=True)
    assert coverage.complete
    assert not caplog.records


def test_no_match_names_both_sides() -> None:
    prior = Prior.from_mapping({UP: torch.ones(3, 5)})
    with pytest.raises(PriorMismatchError, match=f"(?s)no parameter matches.*{UP}.*backbone.w"):
        prior.match([("backbone.w", torch.empty(3, 5))])
    with pytest.raises(PriorMismatchError, match="no parameter matches"):
        prior.match([])
    with pytest.raises(PriorMismatchError, match=r"(?s)no parameter matches.*\[4\] vs\. \[3, 5\]"):
        prior.match([(UP, torch.empty(4))])


def test_two_parameters_for_one_delta_are_refused() -> None:
    prior = Prior.from_mapping({UP: torch.ones(3, 5)})
    with pytest.raises(PriorMismatchError, match=f"model.{UP} and language_model.model.{UP} both claim"):
        prior.match([(f"model.{UP}", torch.empty(3, 5)), (f"language_model.model.{UP}", torch.empty(3, 5))])
