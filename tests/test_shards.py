"""Hundreds of shards: few files are open at a time, and none is opened over and over."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from io import FileIO
from pathlib import Path

import pytest
import torch
from checkpoints import text_weights, tuned, write_checkpoint
from safetensors.torch import load_file

from drift_kernels import Prior, build_prior, combine_priors
from drift_kernels.prior import reading
from drift_kernels.prior.names import natural_key

ROOT = Path(__file__).parents[1]

UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
from drift_kernels import Prior, build_prior
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
folder = Path(sys.argv[1])
sources = {role: folder / role for role in ("expert", "base", "reference")}
prior = build_prior(**sources, out=folder / "prior", modules=("re:.",), max_shard_bytes=1)
assert prior.verify().intact
assert all(prior.load(name).isfinite().all() for name in prior.names)
print(len(prior))
"""


def test_more_shards_than_a_process_may_open(tmp_path: Path) -> None:
    """150 shards per checkpoint and as many of the prior, with a limit of 64 open files."""
    weights = {role: text_weights(layers=17) for role in ("expert", "base", "reference")}
    for role, tensors in weights.items():
        write_checkpoint(tmp_path / role, tensors, shards=150)
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(weights["expert"]) > 150
    assert len(list((tmp_path / "prior").glob("*.safetensors"))) == len(weights["expert"])
    name = "layers.9.mlp.up_proj.weight"
    expected = weights["expert"][f"model.{name}"] - weights["reference"][f"model.{name}"]
    assert torch.equal(Prior.open(tmp_path / "prior").load(name), expected.bfloat16())


def test_a_shard_may_be_filled_to_the_last_byte(tmp_path: Path) -> None:
    deltas = {f"layers.{n}.input_layernorm.weight": torch.randn(64) for n in range(3)}  # of 256 bytes
    options = {"weights": [1], "dtype": torch.float32}
    for room, shards in ((512, [2, 1]), (511, [1, 1, 1])):
        combine_priors([deltas], tmp_path / "prior", max_shard_bytes=room, overwrite=True, **options)
        files = sorted((tmp_path / "prior").glob("*.safetensors"))
        assert [len(load_file(file)) for file in files] == shards


@pytest.mark.parametrize("dealt", ["in order", "in turn"])
def test_a_shard_is_opened_seldom(tmp_path: Path, dealt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for its header, then once if names are in order; otherwise once per tensor, not per piece."""
    monkeypatch.setattr("drift_kernels.prior.stream.CHUNK", 512)
    weights = text_weights(layers=12)
    order = sorted(weights, key=natural_key)
    shards = 60
    if dealt == "in order":  # write_checkpoint deals in turn: undo it
        size = -(-len(order) // shards)
        order = [order[i] for start in range(size) for i in range(start, len(order), size)]
        shards = -(-len(order) // size)
    weights = {name: weights[name] for name in order}
    write_checkpoint(tmp_path / "base", weights, shards=shards)
    write_checkpoint(tmp_path / "expert", tuned(weights), shards=shards)
    opened: Counter[str] = Counter()

    def counted(path: Path) -> FileIO:
        opened[f"{path.parent.name}/{path.name}"] += 1
        return FileIO(path)

    monkeypatch.setattr(reading, "FileIO", counted)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", modules=("re:.",))
    of_sources = {name: count for name, count in opened.items() if name.startswith(("expert", "base"))}
    assert len(of_sources) == 2 * shards
    if dealt == "in order":
        assert set(of_sources.values()) == {2}
    else:
        assert sum(of_sources.values()) <= 2 * (shards + len(prior))
