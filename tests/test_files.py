"""Checkpoint files: what is damaged, incomplete or foreign is named, and checksums show every small change."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import text_weights, write_checkpoint
from safetensors.torch import load_file, save_file

from drift_kernels import CheckpointError, build_prior
from drift_kernels.prior import arithmetic
from drift_kernels.prior.arithmetic import checksum, subtract
from drift_kernels.prior.files import TensorFile

Q_PROJ = "layers.1.self_attn.q_proj.weight"
ROW = 1024  # 64-bit words


def damage(folder: Path, how: str) -> None:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("model-*.safetensors"))
    if how == "truncated":
        single.write_bytes(single.read_bytes()[:-1])
    elif how == "truncated header":
        single.write_bytes(single.read_bytes()[:50])
    elif how == "longer":
        single.write_bytes(single.read_bytes() + b"x")
    elif how == "foreign":
        single.write_bytes(b"PK\x03\x04" + bytes(200))
    elif how == "not JSON":
        single.write_bytes((40).to_bytes(8, "little") + b"x" * 40)
    elif how == "wrong shape":
        header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
        single.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    elif how == "empty file":
        single.write_bytes(b"")
    elif how == "empty folder":
        for path in folder.iterdir():
            path.unlink()
    elif how == "bin":
        single.rename(folder / "pytorch_model.bin")
    elif how == "no index":
        index.unlink()
    elif how == "missing shard":
        shards[1].unlink()
    elif how == "shard lacks":
        save_file({"other": torch.zeros(1)}, shards[1])
    elif how == "broken index":
        index.write_text("[")
    elif how == "index without map":
        index.write_text("{}")
    elif how == "broken config":
        (folder / "config.json").write_text("[]")
    elif how == "codes alone":
        save_file(load_file(single) | {f"model.{Q_PROJ}": torch.zeros(33, 31, dtype=torch.float8_e4m3fn)}, single)


@pytest.mark.parametrize(
    ("how", "shards", "words"),
    [
        ("truncated", 1, r"truncated: expected \d+ bytes from its header, but the file has \d+"),
        ("truncated header", 1, r"model.safetensors \(50 bytes\): truncated or not a safetensors file"),
        ("longer", 1, "damaged: expected"),
        ("foreign", 1, r"\(204 bytes\): not a safetensors file but a torch.save file: save the model again"),
        ("not JSON", 1, "not a safetensors file: cannot read its header"),
        ("wrong shape", 1, r"w: F32\[3\] does not match bytes 0 to 8"),
        ("empty file", 1, r"\(0 bytes\): truncated or not a safetensors file"),
        ("empty folder", 1, "expected model.safetensors or model.safetensors.index.json, the folder is empty"),
        ("bin", 1, r"found PyTorch .bin files \(pytorch_model.bin\): save the model again"),
        ("no index", 3, r"found safetensors files without an index \(model-00001-of-0.*\): add the index"),
        ("missing shard", 3, "model-00002-of-00003.safetensors is missing, but listed in"),
        ("shard lacks", 3, "model-00002-of-00003.safetensors: model.* is missing, but listed"),
        ("broken index", 3, "model.safetensors.index.json: cannot be read as JSON"),
        ("index without map", 3, "it has no weight_map"),
        ("broken config", 1, "config.json: expected a JSON object, found list"),
        (
            "codes alone",
            1,
            rf"the expert contains FP8 codes without scales: 1 of .*{Q_PROJ}",
        ),
    ],
)
def test_bad_checkpoints(tmp_path: Path, how: str, shards: int, words: str) -> None:
    damage(write_checkpoint(tmp_path / "expert", text_weights(), shards=shards), how)
    write_checkpoint(tmp_path / "base", text_weights())
    with pytest.raises(CheckpointError, match=words):
        build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    assert not list(tmp_path.glob("prior*"))


@pytest.mark.parametrize(
    ("length", "words"), [(100_000_000, "its header cannot be read"), (100_000_001, "truncated or not a safetensors")]
)
def test_a_header_is_read_up_to_the_limit_of_the_format(tmp_path: Path, length: int, words: str) -> None:
    """The safetensors library refuses headers above 100 MB. The file is sparse."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little"))
    os.truncate(path, 8 + length)
    with pytest.raises(CheckpointError, match=words):
        TensorFile.inspect(path)


@pytest.mark.parametrize("numel", [0, 3, 4 * ROW, 12 * ROW + 5])
def test_checksum_shows_every_small_change(numel: int) -> None:
    values = torch.randn(numel).bfloat16()
    seen = {checksum(values), checksum(torch.cat([values, values.new_zeros(1)]))}
    assert checksum(values.clone()) in seen
    for _ in range(min(numel, 20)):
        changed = values.clone()
        changed[torch.randint(numel, (1,))] *= -1  # a sign bit alone, at times the highest of its 64-bit word
        two = changed.clone()
        two[torch.randint(numel, (1,))] += 1000
        assert checksum(changed) not in seen
        assert checksum(two) not in seen


def test_checksum_shows_swapped_rows_and_columns() -> None:
    words = torch.randint(-(2**62), 2**62, (3, ROW))
    layouts = (words, words[[1, 0, 2]], words[:, [1, 0, *range(2, ROW)]])
    assert len({checksum(layout.flatten()) for layout in layouts}) == 3


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("numel", [0, 1, 15, 12 * ROW + 5])
def test_the_compiled_pass_and_torch_agree(
    weight: torch.dtype, stored: torch.dtype, numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same deltas and checksums to the bit, inner products to float64's accuracy, for values far apart."""
    expert, base, origin = (torch.randn(numel) * 10 ** torch.empty(numel).uniform_(-6, 4) for _ in range(3))
    expert, base, origin = (tensor.to(weight) for tensor in (expert, base, origin))
    results = []
    for compiled in (True, False):
        monkeypatch.setattr(arithmetic, "_compiled", compiled)
        delta = torch.full((numel,), torch.nan, dtype=stored)
        results.append((delta, subtract(expert, base, origin, delta), checksum(expert)))
    (delta, products, digest), (expected, expected_products, expected_digest) = results
    assert torch.equal(delta, expected)
    assert torch.equal(expected, (expert.float() - origin.float()).to(stored))
    assert digest == expected_digest
    scale = (products.expert_expert * products.base_base) ** 0.5
    for value, other in zip(products, expected_products, strict=True):
        assert value == pytest.approx(other, rel=1e-12, abs=1e-12 * scale)
