"""Prior.verify: compares every bit of the deltas with what was recorded when they were built."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import flip_bit, stored_tensors, text_weights, write_checkpoint
from safetensors.torch import load_file

from drift_kernels import Prior, PriorFormatError, build_prior
from drift_kernels.prior import quantize
from drift_kernels.prior.files import StoredTensor, byte_view
from drift_kernels.prior.norms import CHUNK

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
MODULES = ("attn", "mlp", "norms", "embed", "re:gain|nothing")
LONG = "layers.0.mlp.up_proj.weight"


@pytest.fixture(params=DTYPES, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a delta of several chunks, one with zeros after its common part, a scalar and an empty one."""
    for role, vocabulary in (("expert", 97), ("base", 101)):
        weights = text_weights(vocabulary=vocabulary)
        weights |= {f"model.{LONG}": torch.randn(CHUNK // 512 + 1, 1031)}
        weights |= {"layers.0.gain": torch.randn(()), "layers.0.nothing": torch.randn(0, 4)}
        write_checkpoint(tmp_path / role, weights)
    build_prior(
        tmp_path / "expert",
        tmp_path / "base",
        tmp_path / "prior",
        dtype=request.param,
        modules=MODULES,
        max_shard_bytes=100_000,
    )
    return tmp_path / "prior"


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "drift_prior.json").read_text())


def forget_checksums(folder: Path, version: int) -> None:
    record = record_of(folder)
    record["version"] = version
    for row in record["tensors"].values():
        row.pop("crc32")
        row.pop("scales_crc32", None)
    (folder / "drift_prior.json").write_text(json.dumps(record))


def test_checksums_are_the_crc32_of_the_stored_bytes(folder: Path) -> None:
    rows, tensors = record_of(folder)["tensors"], {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    recorded = {name: row["crc32"] for name, row in rows.items()}
    recorded |= {f"{name}.scales": row["scales_crc32"] for name, row in rows.items() if "scales_crc32" in row}
    assert recorded == {name: f"{zlib.crc32(byte_view(t.reshape(-1))):08x}" for name, t in tensors.items()}


def test_one_flipped_bit_is_found_wherever_it_is(folder: Path) -> None:
    prior = Prior.open(folder)
    assert prior.verify().intact
    assert prior.verify().by_checksum == len(prior)
    tensors = {name: tensor for name, tensor in stored_tensors(folder).items() if tensor.nbytes}
    for name, tensor in tensors.items():
        for byte in {0, tensor.nbytes - 1, random.randrange(tensor.nbytes)}:
            bit = random.randrange(8)
            flip_bit(folder, name, byte, bit)
            damaged, delta = Prior.open(folder), name.removesuffix(".scales")
            verification = damaged.verify()
            assert list(verification.faults) == [delta], (name, byte, bit)
            assert not verification.intact
            assert "damaged: " in verification.summary()
            for read in (damaged.load, damaged.check):
                with pytest.raises(PriorFormatError, match=rf"{delta} is damaged: (its checksum|scales)"):
                    read(delta)
            flip_bit(folder, name, byte, bit)
            if tensor.numel > 10_000:
                break
    assert Prior.open(folder).verify().intact


def test_it_takes_no_more_memory_for_a_longer_delta(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a check of one."""
    read, longest = StoredTensor.read_flat, []

    def read_flat(self: StoredTensor, begin: int, end: int) -> torch.Tensor:
        longest.append(end - begin)
        return read(self, begin, end)

    monkeypatch.setattr(StoredTensor, "read_flat", read_flat)
    calls: list[tuple[int, int]] = []
    prior = Prior.open(folder)
    assert prior.info(LONG).shape[0] * prior.info(LONG).shape[1] > 2 * CHUNK
    assert prior.verify(lambda done, total: calls.append((done, total))).intact
    prior.check(LONG)
    assert max(longest) == CHUNK
    assert calls == sorted(calls)
    assert calls[-1] == (prior.numel, prior.numel)


@pytest.mark.parametrize("version", [1, 2])
def test_a_prior_without_checksums_is_compared_by_its_norms(folder: Path, version: int) -> None:
    forget_checksums(folder, version)
    prior = Prior.open(folder)
    verification = prior.verify()
    assert (verification.by_checksum, verification.by_norm) == (0, len(prior))
    assert verification.intact
    assert f"{len(prior)} were checked only by norm" in verification.summary()
    # The lowest bit of the smallest of some elements. The largest code of fp8, 448, would become a NaN.
    smallest = int(prior.load(LONG).flatten()[:100].abs().argmin())
    flip_bit(folder, LONG, byte=smallest * prior.info(LONG).dtype.itemsize)
    assert Prior.open(folder).verify().intact, "the change is too small for a norm"
    tensor = stored_tensors(folder)["norm.weight"]
    content = tensor.path.read_bytes()
    tensor.path.write_bytes(content[: tensor.offset] + b"\x7e" * (len(content) - tensor.offset))  # large
    damaged = Prior.open(folder)
    assert "damaged: its norm is" in damaged.verify().faults["norm.weight"]
    for read in (damaged.load, damaged.check):
        with pytest.raises(PriorFormatError, match=r"norm\.weight is damaged: its norm is"):
            read("norm.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_scales_that_no_norm_shows(tmp_path: Path, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path / "expert", text_weights())
    write_checkpoint(tmp_path / "base", text_weights())
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=dtype)
    forget_checksums(tmp_path / "prior", 2)
    flip_bit(tmp_path / "prior", f"{LONG}.scales", byte=3, bit=7)
    assert Prior.open(tmp_path / "prior").verify().faults == {LONG: "damaged: scales must be finite and not negative"}


def test_a_record_that_does_not_hold(folder: Path) -> None:
    """The bytes are correct but would not load: the recorded norm is wrong."""
    record = record_of(folder)
    record["tensors"]["norm.weight"]["delta_norm"] *= 2
    (folder / "drift_prior.json").write_text(json.dumps(record))
    assert list(Prior.open(folder).verify().faults) == ["norm.weight"]


def test_deltas_in_memory_have_nothing_to_compare() -> None:
    prior = Prior.from_mapping({"norm.weight": torch.ones(3), LONG: quantize(torch.ones(3), torch.int8)})
    verification = prior.verify()
    assert verification.intact
    assert verification.by_checksum == verification.by_norm == 0
