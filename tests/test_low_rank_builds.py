"""drift-prior build --rank: the content of the files, what is reported about it, and that nothing else changes."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import flip_bit, text_weights, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from drift_kernels import Prior, PriorError, PriorFormatError, build_prior
from drift_kernels.cli import main
from drift_kernels.engine.binding import PriorBinding
from drift_kernels.prior import LowRankDelta, formed, quantize, singular, stream, threads
from drift_kernels.prior.files import TensorFile, byte_view
from drift_kernels.prior.names import module_of
from drift_kernels.prior.summary import group_deltas
from drift_kernels.sharding import Shard

RANK = 6
UP, NORM, BIAS = "layers.0.mlp.up_proj.weight", "layers.0.input_layernorm.weight", "layers.1.self_attn.q_proj.bias"
EMBED, STACK = "embed_tokens.weight", "layers.0.mlp.experts.gate_up_proj"
MODULES = ("attn", "mlp", "norms", "embed", "re:narrow")


@pytest.fixture
def exact(tmp_path: Path) -> dict[str, Tensor]:
    """The exact deltas of the checkpoints in `tmp_path`, by canonical name. The expert has a smaller vocabulary."""
    expert, base = text_weights(prefix="", vocabulary=91), text_weights(prefix="", vocabulary=101)
    for weights in (expert, base):
        weights |= {"layers.0.mlp.narrow.weight": torch.randn(RANK, 90), STACK: torch.randn(2, 40, 50)}
    for role, weights in (("expert", expert), ("base", base)):
        write_checkpoint(tmp_path / role, weights, shards=2)
    expert[EMBED] = torch.cat([expert[EMBED], base[EMBED][91:]])
    return {name: expert[name] - base[name] for name in base}


def build(folder: Path, name: str = "prior", **options: Any) -> Prior:
    return build_prior(
        folder / "expert",
        folder / "base",
        folder / name,
        **{"rank": RANK, "modules": MODULES, "max_shard_bytes": 9_000} | options,
    )


def stored_in(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def is_low_rank(delta: Tensor) -> bool:
    return delta.dim() == 2 and RANK * sum(delta.shape) < delta.numel()


def optimum(delta: Tensor) -> float:
    squares = torch.linalg.svdvals(delta.double()).square()
    return float(squares[:RANK].sum() / squares.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_what_is_stored(exact: dict[str, Tensor], dtype: torch.dtype, tmp_path: Path) -> None:
    """Matrices as factors, within 1 % of the best; everything else bitwise as without a rank."""
    prior, tensors = build(tmp_path, dtype=dtype), stored_in(tmp_path / "prior")
    whole = build(tmp_path, "whole", rank=None, dtype=dtype)
    assert prior.names == whole.names
    assert {name for name in prior.names if prior.info(name).rank} == set(
        filter(lambda n: is_low_rank(exact[n]), exact)
    )
    for name, delta in exact.items():
        info, stored, loaded = prior.info(name), prior.load_stored(name), prior.load(name)
        assert (info.shape, loaded.shape) == (delta.shape, delta.shape)
        assert info.param_norm == whole.info(name).param_norm
        assert info.cosine == whole.info(name).cosine
        if not is_low_rank(delta):
            assert info == whole.info(name)
            assert torch.equal(loaded, whole.load(name))
            continue
        assert isinstance(stored, LowRankDelta)
        assert torch.equal(stored.left, tensors[f"{name}.left"])
        assert torch.equal(stored.right, tensors[f"{name}.right"])
        assert (info.rank, info.dtype, stored.dtype, stored.rank) == (RANK, torch.bfloat16, torch.bfloat16, RANK)
        kept = 1 - float((delta - loaded).double().square().sum() / delta.double().square().sum())
        assert info.kept_energy == pytest.approx(kept, abs=1e-6)
        assert 0.99 * optimum(delta) < kept < optimum(delta) + 1e-6
        assert info.exact_norm == pytest.approx(delta.double().norm().item(), rel=1e-6)
        assert info.delta_norm == pytest.approx(loaded.double().norm().item(), rel=1e-6)
        cosine = torch.nn.functional.cosine_similarity(delta.double().flatten(), loaded.double().flatten(), 0)
        assert info.stored_cosine == pytest.approx(cosine.item(), abs=1e-6)
    assert not prior.load(EMBED)[91:].any()


@pytest.mark.parametrize("box", [(0, 31, 0, 31), (3, 9, 0, 31), (5, 31, 7, 8), (4, 4, 0, 31)], ids=str)
def test_parts_are_read_in_factors(exact: dict[str, Tensor], box: tuple[int, ...], tmp_path: Path) -> None:
    prior, cut = build(tmp_path), (slice(*box[:2]), slice(*box[2:]))
    part = prior.load_stored(UP, box=cut)
    assert isinstance(part, LowRankDelta)
    assert torch.equal(part.expand(), prior.load(UP)[cut])


def test_the_bits_are_the_same_each_time(
    exact: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of threads, and whether matrices are kept in memory or read again, in tiles that end inside the
    pieces that are read."""
    monkeypatch.setattr(singular, "_TILE", 1 << 9)
    monkeypatch.setattr(formed, "tile_rows", singular.tile_rows)
    expected = build(tmp_path)
    for number, (threads_now, in_memory) in enumerate([(1, 1 << 27), (3, 1 << 27), (2, 0), (3, 1000)]):
        for module in (threads, stream):
            monkeypatch.setattr(module, "WORKERS", threads_now)
        monkeypatch.setattr(formed, "_IN_MEMORY", in_memory)
        torch.manual_seed(number)
        again = build(tmp_path, f"again{number}")
        assert again.fingerprint == expected.fingerprint
        assert again.record == expected.record  # the checksums too
        assert all(
            map(torch.equal, stored_in(tmp_path / f"again{number}").values(), stored_in(tmp_path / "prior").values())
        )


def test_fingerprints_and_versions(exact: dict[str, Tensor], tmp_path: Path) -> None:
    """Readers of version 2 can read priors without factors."""
    prior, other = build(tmp_path), build(tmp_path, "other", rank=RANK + 1)
    whole, huge = build(tmp_path, "whole", rank=None), build(tmp_path, "huge", rank=1000)
    assert [p.record["version"] for p in (prior, other, whole, huge)] == [3, 3, 2, 2]
    assert len({p.fingerprint for p in (prior, other, whole)}) == 3
    assert huge.fingerprint == whole.fingerprint
    assert huge.record["tensors"] == whole.record["tensors"]
    assert not any("rank" in row or "kept_energy" in row for row in whole.record["tensors"].values())


def test_what_a_rank_leaves_whole_is_said(
    exact: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = f"1 stacks of matrices, such as {STACK}, are stored whole, not as factors"
    assert words in build(tmp_path).record["warnings"]
    assert words in caplog.text
    found = build(tmp_path, "norms", modules=("norms",)).record["warnings"]
    assert f"all matrices are stored whole: none is larger than its factors of rank {RANK}" in found


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
def test_ranks_that_are_none(exact: dict[str, Tensor], rank: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank must be a positive integer, got"):
        build(tmp_path, rank=rank)
    assert not (tmp_path / "prior").exists()


def test_names_that_are_in_the_way(tmp_path: Path) -> None:
    for role in ("expert", "base"):
        weights = text_weights(prefix="") | {f"{UP}.left": torch.randn(3)}
        write_checkpoint(tmp_path / role, weights)
    with pytest.raises(PriorError, match=f"{UP}.left is a tensor of the checkpoints, but the left of {UP} has"):
        build(tmp_path, modules=("mlp", r"re:left"))


def test_nan_in_a_matrix_is_noticed(tmp_path: Path) -> None:
    for role in ("expert", "base"):
        weights = text_weights(prefix="")
        weights[UP][3, 4] = float("nan")
        write_checkpoint(tmp_path / role, weights)
    with pytest.raises(PriorError, match=f"{UP} contains NaN or Inf"):
        build(tmp_path)
    assert not list(tmp_path.glob("prior*"))


def test_deltas_of_zeros(tmp_path: Path) -> None:
    base = text_weights(prefix="")
    expert = base | {"layers.0.mlp.down_proj.weight": torch.randn(base["layers.0.mlp.down_proj.weight"].shape)}
    write_checkpoint(tmp_path / "expert", expert)
    write_checkpoint(tmp_path / "base", base)
    info = build(tmp_path).info(UP)
    assert (info.delta_norm, info.exact_norm, info.kept_energy, info.stored_cosine) == (0.0, 0.0, None, None)
    assert not Prior.open(tmp_path / "prior").load(UP).any()


# Damage


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_flipped_bit_is_found(exact: dict[str, Tensor], side: str, tmp_path: Path) -> None:
    prior = build(tmp_path)
    rows, tensors = prior.record["tensors"], stored_in(tmp_path / "prior")
    recorded = {
        f"{name}.{s}": row[f"{s}_crc32"] for name, row in rows.items() for s in ("left", "right") if "rank" in row
    }
    assert recorded == {n: f"{zlib.crc32(byte_view(t.view(-1))):08x}" for n, t in tensors.items() if n in recorded}
    assert prior.verify().intact
    assert prior.verify().by_checksum == len(prior)
    flip_bit(tmp_path / "prior", f"{UP}.{side}", byte=10)
    assert list(prior.verify().faults) == [UP]
    assert "its checksum is" in prior.verify().faults[UP]
    assert main(["check", str(tmp_path / "prior"), "--verify"]) == 1


def test_a_damaged_factor_is_noticed_when_it_is_read(exact: dict[str, Tensor], tmp_path: Path) -> None:
    build(tmp_path)
    flip_bit(tmp_path / "prior", f"{UP}.left")
    with pytest.raises(PriorFormatError, match=f"{UP} is damaged: its checksum is"):
        Prior.open(tmp_path / "prior").load_stored(UP)


def test_the_norm_of_shards_is_that_of_their_factors(exact: dict[str, Tensor], tmp_path: Path) -> None:
    """Not of the delta rounded to bfloat16, whose norm differs by more than the threshold for damage."""
    binding = PriorBinding(build(tmp_path))
    shape = tuple(exact[UP].shape)
    param = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    binding.check([(UP, param)])
    whole = tuple(slice(0, size) for size in shape)
    (bound,) = binding.bind([(UP, param, Shard(shape, whole, ()))])
    assert bound is not None
    assert bound.delta_norm == binding.prior.info(UP).delta_norm
    half = PriorBinding(binding.prior)
    half.check([(UP, param)])
    with pytest.raises(PriorFormatError, match=f"{UP} is damaged: its norm is"):
        half.bind([(UP, nn.Parameter(param[:30]), Shard(shape, (slice(0, 30), whole[1]), ()))])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": RANK + 1}, rf"{UP}.left is recorded as torch.bfloat16 \[.*, 7\], but stored as"),
        ({"rank": "6"}, "missing or invalid: rank '6' for a delta"),
        ({"rank": 0}, "missing or invalid: rank 0"),
        ({"shape": [5]}, r"missing or invalid: rank 6 for a delta of shape \[5\]"),
    ],
)
def test_a_record_that_does_not_hold(
    exact: dict[str, Tensor], changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    build(tmp_path)
    path = tmp_path / "prior" / "drift_prior.json"
    record = json.loads(path.read_text())
    record["tensors"][UP] |= changes
    path.write_text(json.dumps(record))
    with pytest.raises(PriorFormatError, match=words):
        Prior.open(tmp_path / "prior")


# The command


def test_the_command_and_what_it_shows(
    exact: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ("--expert", tmp_path / "expert", "--base", tmp_path / "base", "--out", tmp_path / "prior")
    command = ["build", *map(str, paths), "--rank", str(RANK), "--modules", ",".join(MODULES)]
    assert main(command) == 0
    prior = Prior.open(tmp_path / "prior")
    assert prior.fingerprint == build(tmp_path, "other").fingerprint
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "prior")]) == 0
    printed = capsys.readouterr().out
    assert f"bfloat16, matrices of rank {RANK}, fingerprint" in printed
    infos = {name: prior.info(name) for name in prior.names}
    mlp = [info for name, info in infos.items() if name.startswith("layers.1.mlp.")]
    kept = sum(info.kept_energy * info.exact_norm**2 for info in mlp) / sum(info.exact_norm**2 for info in mlp)
    assert [line.split()[-1] for line in printed.splitlines() if " mlp " in line][1] == f"{kept:.2%}"
    assert next(line.split()[-1] for line in printed.splitlines() if " norm " in line) == "-"
    assert all(len(line) <= 80 for line in printed.splitlines() if "│" in line or "norm(exact)" in line)

    squares = {n: (info.exact_norm or info.delta_norm) ** 2 for n, info in infos.items()}
    total = sum(squares[n] * (1 if info.kept_energy is None else info.kept_energy) for n, info in infos.items())
    total /= sum(squares.values())
    assert f"over all deltas {total:.2%}" in printed
    assert main(["inspect", str(tmp_path / "prior"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rank"], found["kept_energy"]) == (RANK, pytest.approx(total))
    groups = group_deltas(prior, module_of)
    assert (groups["norm"].rank, groups["norm"].kept_energy) == (None, None)
    assert (groups["embed"].rank, groups["embed"].kept_energy) == (RANK, pytest.approx(infos[EMBED].kept_energy))


@pytest.mark.parametrize("rank", ["0", "-3", "1.5", "many", ""])
def test_ranks_that_are_mistyped(rank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["build", "--expert", "a", "--base", "b", "--out", str(tmp_path / "c"), f"--rank={rank}"])
    assert stop.value.code == 2
    assert f"expected a positive integer, got {rank!r}" in capsys.readouterr().err


def test_codes_beside_factors(exact: dict[str, Tensor], tmp_path: Path) -> None:
    """In an int8 prior with a rank, vectors are stored as codes, and aligned."""
    prior = build(tmp_path, dtype=torch.int8, max_shard_bytes=1 << 30)
    stored, expected = prior.load_stored(BIAS), quantize(exact[BIAS], torch.int8)
    assert torch.equal(stored.codes, expected.codes)
    (path,) = (tmp_path / "prior").glob("*-of-*.safetensors")
    for tensor in TensorFile.inspect(path).tensors.values():
        assert isinstance(tensor.dtype, torch.dtype)
        assert tensor.offset % tensor.dtype.itemsize == 0
