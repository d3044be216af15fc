"""8-bit priors on disk: built (compared with quantising the whole delta), opened, and damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import text_weights, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from drift_kernels import Prior, PriorError, PriorFormatError, build_prior
from drift_kernels.prior import BLOCK, quantize
from drift_kernels.prior.norms import CHUNK

DTYPES = [torch.int8, torch.float8_e4m3fn]
LEAST_COSINE = {torch.int8: 0.9999, torch.float8_e4m3fn: 0.999}  # of Gaussian deltas
UP, EMBED = "layers.0.mlp.up_proj.weight", "embed_tokens.weight"

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=DTYPES, ids=str)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor], torch.dtype]:
    """A prior with a few tensors per shard; the exact deltas by canonical name; its dtype."""
    expert, base = text_weights(prefix=""), text_weights(prefix="")
    for sign, weights in ((1, expert), (-1, base)):  # the gains differ: a delta of zero has no cosine
        weights |= {"layers.0.mlp.gain": sign * (1 + torch.rand(())), "layers.0.mlp.nothing": torch.randn(0, 4)}
    for role, weights in (("expert", expert), ("base", base)):
        write_checkpoint(tmp_path / role, weights)
    folder = tmp_path / "prior"
    modules = ("attn", "mlp", "norms", "embed", "re:gain|nothing")
    build_prior(
        tmp_path / "expert", tmp_path / "base", folder, dtype=request.param, modules=modules, max_shard_bytes=7_000
    )
    return folder, {name: expert[name] - base[name] for name in base}, request.param


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "prior.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def test_built_and_opened(built: tuple[Path, dict[str, Tensor], torch.dtype]) -> None:
    """Codes, scales and expansion bitwise; norms and cosines to 1e-6."""
    folder, exact, dtype = built
    prior = Prior.open(folder)
    assert set(prior.names) == set(exact)
    assert prior.record["dtype"] == str(dtype).removeprefix("torch.")
    for name, delta in exact.items():
        expected, stored, info = quantize(delta, dtype), prior.load_stored(name, "cpu"), prior.info(name)
        assert torch.equal(stored.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert torch.equal(stored.scales, expected.scales)
        assert (info.dtype, info.shape) == (dtype, delta.shape)
        dense = prior.load(name)
        assert torch.equal(dense, expected.expand())
        assert info.delta_norm == pytest.approx(dense.double().norm().item(), rel=1e-6)
        if not delta.numel():
            assert info.stored_cosine is None
            continue
        cosine = torch.cosine_similarity(delta.double().flatten(), dense.double().flatten(), dim=0, eps=0)
        assert info.stored_cosine == pytest.approx(cosine.item(), abs=1e-9)
        if delta.numel() > 1000:
            assert LEAST_COSINE[dtype] <= info.stored_cosine < 1


def test_files_are_ordinary_safetensors(built: tuple[Path, dict[str, Tensor], torch.dtype]) -> None:
    folder, exact, dtype = built
    index = json.loads((folder / "prior.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert tensors.keys() == index["weight_map"].keys() == exact.keys() | {f"{name}.scales" for name in exact}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, delta in exact.items():
        assert shard_of(folder, name) == shard_of(folder, f"{name}.scales")
        codes, scales = tensors[name], tensors[f"{name}.scales"]
        assert (codes.dtype, codes.shape) == (dtype, delta.shape)
        dense = codes.float().flatten() * scales.repeat_interleave(BLOCK)[: delta.numel()]
        assert torch.equal(dense.view(delta.shape), Prior.open(folder).load(name))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", f"disagree about {UP}.scales"),
        ("missing in the shard", f"{UP}.scales is missing"),
        ("dtype", rf"{UP}.scales is recorded as torch.float32 \[16\], but stored as torch.float16 \[16\]"),
        ("shape", rf"{UP}.scales is recorded as torch.float32 \[16\], but stored as torch.float32 \[17\]"),
        ("codes' dtype", f"{UP} is recorded as .* stored as torch.float32"),
        ("foreign", "disagree about other"),
        ("truncated", "truncated"),
    ],
)
def test_what_does_not_fit_its_record_does_not_open(
    built: tuple[Path, dict[str, Tensor], torch.dtype], how: str, words: str
) -> None:
    folder, _, _ = built
    path = shard_of(folder, UP)
    tensors, scales = load_file(path), f"{UP}.scales"
    index = json.loads((folder / "prior.safetensors.index.json").read_text())
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "missing in the shard":
        del tensors[scales]
    elif how == "missing":
        del tensors[scales], index["weight_map"][scales]
    elif how == "foreign":
        index["weight_map"]["other"] = path.name
        tensors["other"] = torch.ones(1)
    elif how == "codes' dtype":
        tensors[UP] = tensors[UP].float()
    else:
        tensors[scales] = tensors[scales].half() if how == "dtype" else torch.ones(17)
    if how != "truncated":
        save_file(tensors, path)
    (folder / "prior.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PriorFormatError, match=words):
        Prior.open(folder)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "scales must be finite and not negative"),
        (float("inf"), "scales must be finite and not negative"),
        (-1.0, "scales must be finite and not negative"),
        (123.0, "its checksum is .* recorded"),
    ],
)
def test_damaged_scales_are_noticed_and_named(
    built: tuple[Path, dict[str, Tensor], torch.dtype], value: float, words: str
) -> None:
    folder, _, _ = built
    prior, path = Prior.open(folder), shard_of(folder, UP)
    tensors = load_file(path)
    tensors[f"{UP}.scales"][-1] = value
    save_file(tensors, path)
    prior = Prior.open(folder)
    for load in (prior.load, prior.load_stored):
        with pytest.raises(PriorFormatError, match=f"{UP} is damaged: {words}"):
            load(UP)


@both_dtypes
@pytest.mark.parametrize(("rows", "width"), [(101, 311), (113, 311), (153, 2 * CHUNK // 101 + 1)])
def test_blocks_go_on_where_the_common_vocabulary_ends(
    rows: int, width: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Compared with quantising the whole delta. The expert's 101 rows end inside a block; the widest rows have several
    pieces each."""
    assert 101 * width % BLOCK
    expert, base = torch.randn(101, width), torch.randn(rows, width)
    for role, weight in (("expert", expert), ("base", base)):
        write_checkpoint(tmp_path / role, text_weights() | {f"model.{EMBED}": weight})
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=dtype, modules=("embed",))
    exact = torch.zeros_like(base)
    exact[:101] = expert - base[:101]
    expected, stored = quantize(exact, dtype), prior.load_stored(EMBED)
    assert torch.equal(stored.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(stored.scales, expected.scales)
    cosine = torch.cosine_similarity(exact.double().flatten(), stored.expand().double().flatten(), dim=0).item()
    assert prior.info(EMBED).stored_cosine == pytest.approx(cosine, abs=1e-9)


def test_a_tensor_where_scales_would_go_is_refused(tmp_path: Path) -> None:
    for role in ("expert", "base"):
        write_checkpoint(tmp_path / role, text_weights() | {f"model.{UP}.scales": torch.randn(3)})
    options = {"modules": [r"re:up_proj"], "out": tmp_path / "prior"}
    with pytest.raises(PriorError, match=f"{UP}.scales is a tensor of the checkpoints"):
        build_prior(tmp_path / "expert", tmp_path / "base", dtype=torch.int8, **options)
    assert not list(tmp_path.glob("prior*"))
    assert UP in build_prior(tmp_path / "expert", tmp_path / "base", **options).names


BUILD_AND_REPORT = """
import pathlib, re, sys, torch
from drift_kernels import build_prior
expert, base, out, dtype = sys.argv[1:]
build_prior(expert, base, out, dtype=getattr(torch, dtype))
print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@both_dtypes
def test_memory_stays_flat(dtype: torch.dtype, tmp_path: Path) -> None:
    """A tensor of 160 MB takes no more memory than one of 40 MB, which already fills the pieces in progress. The
    allowance for the allocators is half of the difference between the tensors."""
    peaks = []  # kB
    for numel in (10_000_001, 40_000_001):
        folder = tmp_path / str(numel)
        for role in ("expert", "base"):
            write_checkpoint(folder / role, {f"model.{UP}": torch.randn(numel)})
        arguments = [folder / "expert", folder / "base", folder / "prior", str(dtype).removeprefix("torch.")]
        command = [sys.executable, "-c", BUILD_AND_REPORT, *map(str, arguments)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 60_000
