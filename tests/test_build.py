"""Building: correct values for any layout, clear errors for bad checkpoints, and nothing left by a killed build."""

from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import text_weights, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from drift_kernels import CheckpointError, Prior, PriorError, PriorFormatError, build_prior
from drift_kernels.prior.names import canonical_name, module_of
from drift_kernels.prior.norms import CHUNK
from drift_kernels.prior.record import DTYPES

EVERYTHING = ("attn", "mlp", "norms", "embed", "head")
Q_PROJ = "layers.1.self_attn.q_proj.weight"


class Pair:
    """Two checkpoints of one small language model, stored under a text model's and a LLaVA's names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expert, self.base = text_weights(), text_weights(prefix="language_model.model.")

    def build(self, shards: int = 1, **options: object) -> Prior:
        for role, weights in (("expert", self.expert), ("base", self.base)):
            if not (self.folder / role).exists():
                write_checkpoint(self.folder / role, weights, shards=shards)
        return build_prior(self.folder / "expert", self.folder / "base", self.folder / "prior", **options)

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("prior*"))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def by_canonical_name(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {canonical_name(name): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("same_dtypes", [True, False])
def test_deltas_and_norms(pair: Pair, stored: torch.dtype, same_dtypes: bool, dtype: torch.dtype) -> None:
    """Deltas are bitwise identical to a float32 subtraction; norms and cosine match float64 to 1e-6."""
    pair.expert = {name: tensor.to(stored) for name, tensor in pair.expert.items()}
    if same_dtypes:
        pair.base = {name: tensor.to(stored) for name, tensor in pair.base.items()}
    prior = pair.build(shards=3, dtype=dtype, modules=EVERYTHING, max_shard_bytes=30_000)
    expert, base = by_canonical_name(pair.expert), by_canonical_name(pair.base)
    assert set(prior.names) == set(base)
    for name in prior.names:
        delta, info = prior.load(name), prior.info(name)
        assert torch.equal(delta, (expert[name].float() - base[name].float()).to(dtype))
        e, b = expert[name].double().flatten(), base[name].double().flatten()
        assert info.delta_norm == pytest.approx(delta.double().norm().item(), rel=1e-6)
        assert info.param_norm == pytest.approx(b.norm().item(), rel=1e-6)
        assert info.cosine == pytest.approx((e @ b / e.norm() / b.norm()).item(), abs=1e-6)


def test_tensors_longer_than_a_chunk(pair: Pair) -> None:
    shape = (3, CHUNK // 2 + 17)
    for weights in (pair.expert, pair.base):
        prefix = next(iter(weights)).removesuffix("embed_tokens.weight")
        weights[f"{prefix}layers.0.mlp.up_proj.weight"] = torch.randn(shape)
    prior = pair.build(dtype=torch.float32, max_shard_bytes=1000)
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(prior.load(name), by_canonical_name(pair.expert)[name] - by_canonical_name(pair.base)[name])


def test_files_are_ordinary_safetensors(pair: Pair) -> None:
    prior = pair.build(max_shard_bytes=20_000)
    index = json.loads((pair.folder / "prior" / "prior.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"prior-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    tensors = {name: t for shard in shards for name, t in load_file(pair.folder / "prior" / shard).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert all(torch.equal(prior.load(name), tensors[name]) for name in prior.names)
    assert len(tensors) == len(prior)
    assert str(pair.folder) not in (pair.folder / "prior" / "drift_prior.json").read_text()


def test_scalars_and_empty_tensors(pair: Pair) -> None:
    for weights in (pair.expert, pair.base):
        weights |= {"layers.0.gain": torch.randn(()), "layers.0.nothing": torch.randn(0, 4)}
    prior = pair.build(modules=[r"re:gain|nothing"], dtype=torch.float32)
    assert torch.equal(prior.load("layers.0.gain"), pair.expert["layers.0.gain"] - pair.base["layers.0.gain"])
    assert prior.load("layers.0.nothing").shape == (0, 4)
    assert prior.info("layers.0.nothing").cosine is None


def test_reference_is_subtracted_and_base_is_measured(pair: Pair) -> None:
    reference = text_weights()
    write_checkpoint(pair.folder / "reference", reference)
    prior = pair.build(reference=pair.folder / "reference", dtype=torch.float32)
    expert, base = by_canonical_name(pair.expert), by_canonical_name(pair.base)
    assert torch.equal(prior.load(Q_PROJ), expert[Q_PROJ] - by_canonical_name(reference)[Q_PROJ])
    assert prior.info(Q_PROJ).param_norm == pytest.approx(base[Q_PROJ].double().norm().item(), rel=1e-6)
    assert set(prior.record["sources"]) == {"expert", "base", "reference"}


def test_modules_and_layers(pair: Pair) -> None:
    prior = pair.build(modules=("attn",), layers=[0, 2])
    assert {module_of(name) for name in prior.names} == {"attn"}
    assert {name.split(".")[1] for name in prior.names} == {"0", "2"}
    assert "layers.0.self_attn.q_proj.bias" in prior.names
    default = pair.build(overwrite=True)
    assert {module_of(name) for name in default.names} == {"attn", "mlp"}


def test_the_fingerprint_is_the_content_not_the_layout(pair: Pair) -> None:
    first = pair.build(shards=1).fingerprint
    write_checkpoint(pair.folder / "again", dict(reversed(pair.expert.items())), shards=4)
    again = build_prior(
        pair.folder / "again", pair.folder / "base", pair.folder / "prior", overwrite=True, max_shard_bytes=1
    )
    assert again.fingerprint == first
    others = [pair.build(overwrite=True, dtype=dtype).fingerprint for dtype in DTYPES.values()]
    assert len({*others}) == len(DTYPES)
    pair.expert[f"model.{Q_PROJ}"][0, 0] += 1
    write_checkpoint(pair.folder / "changed", pair.expert)
    changed = build_prior(pair.folder / "changed", pair.folder / "base", pair.folder / "prior", overwrite=True)
    assert changed.fingerprint not in {first, *others}


def test_a_name_map_is_recorded_and_used_for_live_names_too(pair: Pair) -> None:
    pair.base = {name.replace("language_model.model.layers.", "trunk.h."): t for name, t in pair.base.items()}
    prior = pair.build(name_map={"trunk.h.": "layers."})
    live = [(f"module.{name}", tensor) for name, tensor in pair.base.items()]
    assert len(Prior.open(pair.folder / "prior").match(live, strict=True).matched) == len(prior)


def test_vocabularies_of_different_size(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    pair.base = text_weights(vocabulary=113, prefix="language_model.model.")
    prior = pair.build(modules=("embed",), dtype=torch.float32)
    expert, base = pair.expert["model.embed_tokens.weight"], pair.base["language_model.model.embed_tokens.weight"]
    delta = prior.load("embed_tokens.weight")
    assert delta.shape == base.shape
    assert torch.equal(delta[:101], expert - base[:101])
    assert not delta[101:].any()
    assert prior.info("embed_tokens.weight").param_norm == pytest.approx(base.double().norm().item(), rel=1e-6)
    cosine = torch.cosine_similarity(expert.double().flatten(), base[:101].double().flatten(), dim=0).item()
    assert prior.info("embed_tokens.weight").cosine == pytest.approx(cosine, abs=1e-6)
    assert any("vocabularies differ (base 113, expert 101 rows)" in warning for warning in prior.record["warnings"])
    assert "vocabularies differ" in caplog.text


def test_tied_heads(pair: Pair) -> None:
    head = torch.randn(101, 31)
    pair.base["language_model.lm_head.weight"] = head
    prior = pair.build(modules=("head",), dtype=torch.float32)
    assert torch.equal(prior.load("lm_head.weight"), pair.expert["model.embed_tokens.weight"] - head)
    assert any("the expert's head is tied" in warning for warning in prior.record["warnings"])
    with pytest.raises(PriorError, match="share no tensor of modules head"):
        build_prior(pair.folder / "base", pair.folder / "expert", pair.folder / "other", modules=("head",))


def test_warnings_for_rope_and_for_tensors_without_counterpart(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    del pair.base["language_model.model.layers.1.self_attn.q_proj.bias"]
    write_checkpoint(pair.folder / "expert", pair.expert, config={"rope_theta": 10000.0})
    nested = {"text_config": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}}
    write_checkpoint(pair.folder / "base", pair.base, config=nested)
    with caplog.at_level(logging.WARNING, "drift_kernels"):
        warnings = pair.build().record["warnings"]
    assert "rope_theta differs: 10000 in the expert, 1e+06 in the base" in warnings
    assert "1 tensors of the expert have no counterpart: layers.1.self_attn.q_proj.bias" in warnings
    assert [record.message for record in caplog.records] == warnings


def test_checkpoints_that_do_not_fit(pair: Pair) -> None:
    pair.build()
    write_checkpoint(pair.folder / "deeper", text_weights(layers=4))
    with pytest.raises(PriorError, match=r"deeper has 4 layers, .*base has 3"):
        build_prior(pair.folder / "deeper", pair.folder / "base", pair.folder / "other")
    wider = text_weights() | {f"model.{Q_PROJ}": torch.randn(35, 31)}
    write_checkpoint(pair.folder / "wider", wider)
    with pytest.raises(PriorError, match=rf"{Q_PROJ} has shape \[35, 31\] in the expert, \[33, 31\] in the base"):
        build_prior(pair.folder / "wider", pair.folder / "base", pair.folder / "other")
    write_checkpoint(pair.folder / "foreign", {"h.0.attn.c_attn.weight": torch.randn(3)})
    with pytest.raises(PriorError, match="layers"):
        build_prior(pair.folder / "foreign", pair.folder / "base", pair.folder / "other")
    assert not (pair.folder / "other").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("role", ["expert", "base"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_nan_and_inf_name_the_tensor_and_leave_nothing(pair: Pair, role: str, value: float, dtype: torch.dtype) -> None:
    weights = getattr(pair, role)
    weights[next(name for name in weights if name.endswith(Q_PROJ))][-1, -1] = value
    with pytest.raises(PriorError, match=f"{Q_PROJ} contains NaN or Inf"):
        pair.build(dtype=dtype)
    assert not pair.leftovers()


def test_an_existing_folder_is_in_the_way_unless_it_is_a_prior_and_may_go(pair: Pair) -> None:
    first = pair.build().fingerprint
    with pytest.raises(PriorError, match="already exists"):
        pair.build()
    assert pair.build(overwrite=True).fingerprint == first
    assert pair.leftovers() == ["prior"]
    other = pair.folder / "other"
    other.mkdir()
    (other / "precious").touch()
    with pytest.raises(PriorError, match="is not a prior, so it is not replaced"):
        build_prior(pair.folder / "expert", pair.folder / "base", other, overwrite=True)
    assert (other / "precious").exists()


def test_a_failed_rebuild_keeps_the_old_prior(pair: Pair) -> None:
    first = pair.build().fingerprint
    write_checkpoint(pair.folder / "broken", pair.expert | {f"model.{Q_PROJ}": torch.full((33, 31), torch.nan)})
    with pytest.raises(PriorError, match=Q_PROJ):
        build_prior(pair.folder / "broken", pair.folder / "base", pair.folder / "prior", overwrite=True)
    assert Prior.open(pair.folder / "prior").fingerprint == first
    assert pair.leftovers() == ["prior"]


def test_threads_are_given_back_and_progress_is_reported(pair: Pair) -> None:
    calls: list[tuple[int, int]] = []
    torch.set_num_threads(3)
    try:
        prior = pair.build(progress=lambda done, total: calls.append((done, total)))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert calls == sorted(calls)
    assert calls[-1] == (prior.numel, prior.numel)


def test_bad_options(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float32, .*float8_e4m3fn, got torch.float16"):
        pair.build(dtype=torch.float16)
    with pytest.raises(ValueError, match="modules must be any of"):
        pair.build(modules=("attention",))


def test_a_folder_that_is_not_there(pair: Pair) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        build_prior(pair.folder / "nowhere", pair.folder / "nowhere", pair.folder / "prior")


KILLED_BUILD = """
import os, pathlib, signal, sys, torch
folder, moment, dtype = pathlib.Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
from drift_kernels import build_prior
from drift_kernels.prior import build

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def progress(done, total):
    if moment == "start" or moment == "middle" and done > total / 2 or moment == "end" and done == total:
        die()

if moment == "before the record":
    build.write_json = die
if moment == "before the rename":
    pathlib.Path.rename = die
print("building", flush=True)
while True:
    options = {"dtype": dtype, "overwrite": True, "progress": progress, "max_shard_bytes": 50_000}
    build_prior(folder / "expert", folder / "base", folder / moment / "prior", **options)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_killed_build_leaves_nothing_that_opens(pair: Pair, dtype: str) -> None:
    pair.build()
    moments = ["start", "middle", "end", "before the record", "before the rename", "from outside"]
    command = [sys.executable, "-c", KILLED_BUILD, str(pair.folder)]
    builds = {moment: subprocess.Popen([*command, moment, dtype], stdout=subprocess.PIPE) for moment in moments}
    assert builds["from outside"].stdout.readline()
    time.sleep(random.uniform(0, 0.05))
    builds["from outside"].kill()
    for moment, process in builds.items():
        assert process.wait(timeout=600) == -signal.SIGKILL, moment
        for leftover in (pair.folder / moment).glob("prior*"):
            if moment != "from outside":
                assert leftover.name != "prior"
            if leftover.name != "prior":
                with pytest.raises(PriorFormatError, match="was not finished"):
                    Prior.open(leftover)
            else:
                assert Prior.open(leftover).load(Q_PROJ).isfinite().all()
