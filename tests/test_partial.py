"""Checkpoints on the Hub of which only what is needed is fetched, from a server on loopback, with its faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import text_weights, tuned, write_checkpoint
from huggingface_hub import constants, snapshot_download
from loopback import COMMIT, LoopbackHub
from safetensors.torch import load_file, save_file
from torch import Tensor

from drift_kernels import CheckpointError, Prior, build_prior
from drift_kernels.cli import main
from drift_kernels.prior import partial, ranges
from drift_kernels.prior.files import Source, TensorFile
from drift_kernels.prior.names import canonical_name, module_of
from drift_kernels.prior.opening import open_checkpoint

pytestmark = pytest.mark.skipif(not ranges.can_read_ranges(), reason="this Hub client reads whole files")

NAME = "model.layers.3.mlp.up_proj.weight"
HEAD = 6000  # bytes; more than the header of a shard, and less than that of the single file


@pytest.fixture
def hub(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """A base in shards, an expert in one file."""
    monkeypatch.setattr(partial, "_HEAD", HEAD)
    monkeypatch.setattr(partial, "_GAP", 0)
    monkeypatch.setattr(ranges, "_FIRST_WAIT", 1e-3)
    weights = text_weights(layers=6)
    write_checkpoint(loopback_hub.folder / "org/base", weights, shards=3)
    write_checkpoint(loopback_hub.folder / "org/expert", tuned(weights))
    return loopback_hub


def build(hub: LoopbackHub, out: Path, modules: list[str] | None = None, **options: Any) -> Prior:
    return build_prior("org/expert", "org/base", out, modules=modules or ["attn"], overwrite=True, **options)


def expected(hub: LoopbackHub, tmp_path: Path, modules: list[str] | None = None) -> Prior:
    folders = hub.folder / "org/expert", hub.folder / "org/base"
    return build_prior(*folders, tmp_path / "expected", modules=modules or ["attn"], overwrite=True)


def needed(folder: Path, modules: tuple[str, ...]) -> int:
    """The bytes of the headers as they are asked for, and of the tensors beyond."""
    total = 0
    for path in folder.glob("*.safetensors"):
        tensors = TensorFile.inspect(path).tensors
        first = min(tensor.offset for tensor in tensors.values())
        held = set(range(max(HEAD, first)))
        for name, tensor in tensors.items():
            if module_of(canonical_name(name)) in modules:
                held |= set(range(tensor.offset, tensor.offset + tensor.nbytes))
        total += len(held)
    return total


def test_only_the_tensors_that_are_needed_are_fetched(hub: LoopbackHub, tmp_path: Path) -> None:
    prior = build(hub, tmp_path / "prior")
    for repository in ("org/base", "org/expert"):
        folder = hub.folder / repository
        assert hub.bytes_asked(repository) == needed(folder, ("attn",))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert hub.bytes_asked(repository) < 0.5 * size
    assert prior.fingerprint == expected(hub, tmp_path).fingerprint
    assert {asked.revision for asked in hub.asked} == {COMMIT}


def test_what_has_been_fetched_is_not_fetched_again(hub: LoopbackHub, tmp_path: Path) -> None:
    build(hub, tmp_path / "prior")
    hub.asked.clear()
    assert build(hub, tmp_path / "again").fingerprint == Prior.open(tmp_path / "prior").fingerprint
    assert not any(asked.range for asked in hub.asked)
    both = build(hub, tmp_path / "both", ["attn", "mlp"])
    for repository in ("org/base", "org/expert"):
        folder = hub.folder / repository
        assert hub.bytes_asked(repository) == needed(folder, ("attn", "mlp")) - needed(folder, ("attn",))
    assert both.fingerprint == expected(hub, tmp_path, ["attn", "mlp"]).fingerprint


def test_large_ranges_are_cut_and_near_ones_joined(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "_REQUEST", 3000)
    build(hub, tmp_path / "prior")
    assert max(asked.range[1] - asked.range[0] for asked in hub.asked if asked.range) == max(HEAD, 3000)
    assert hub.bytes_asked("org/base") == needed(hub.folder / "org/base", ("attn",))
    assert Prior.open(tmp_path / "prior").fingerprint == expected(hub, tmp_path).fingerprint
    before = len(hub.asked)
    monkeypatch.setattr(partial, "_GAP", 1 << 20)
    monkeypatch.setattr(partial, "_REQUEST", 32 << 20)
    build(hub, tmp_path / "mlp", ["mlp"])
    assert len([asked for asked in hub.asked[before:] if asked.range]) == 4  # one for each file


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "short", "silent"])
def test_what_fails_in_passing_is_tried_again(fault: str, hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.extend([fault, "fine", fault, fault, "fine", "fine", fault])
    prior = build(hub, tmp_path / "prior")
    assert not hub.faults
    assert prior.fingerprint == expected(hub, tmp_path).fingerprint


def test_of_an_answer_that_breaks_off_the_rest_is_asked_for(hub: LoopbackHub, tmp_path: Path) -> None:
    with open_checkpoint("org/expert") as checkpoint:
        tensor = checkpoint.tensors[NAME]
        hub.asked.clear()
        hub.faults.extend(["silent", "short"])
        checkpoint.fetch([tensor])
        begin, end = next(tensor.places())[1:]
        half = begin + (end - begin) // 2
        assert [asked.range for asked in hub.asked][:2] == [(begin, end), (half, end)]
        assert hub.asked[2].range == (half + (end - half) // 2, end)
        assert torch.equal(checkpoint.read(tensor), load_file(hub.folder / "org/expert/model.safetensors")[NAME])


def test_as_long_as_something_arrives_it_goes_on(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "_STREAMS", 1)
    with open_checkpoint("org/expert"), open_checkpoint("org/base"):
        pass
    hub.faults.extend(["short"] * 2 * ranges._RETRIES)
    assert build(hub, tmp_path / "prior").fingerprint == expected(hub, tmp_path).fingerprint


@pytest.mark.parametrize("fault", ["500", "drop", "empty"])
def test_what_keeps_failing_ends_and_what_has_arrived_is_kept(
    fault: str, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "_STREAMS", 1)
    monkeypatch.setattr(partial, "_REQUEST", 4000)
    with open_checkpoint("org/expert"), open_checkpoint("org/base"):
        pass
    before = hub.bytes_asked("org/expert")
    hub.faults.extend(["fine", "fine", *[fault] * (ranges._RETRIES + 1)])
    with pytest.raises(CheckpointError, match=r"org/expert@0123.*: model.safetensors: cannot be fetched .*5 retries"):
        build(hub, tmp_path / "prior")
    assert not list(tmp_path.glob("prior*"))
    assert not hub.faults
    hub.asked.clear()
    assert build(hub, tmp_path / "prior").fingerprint == expected(hub, tmp_path).fingerprint
    assert before + hub.bytes_asked("org/expert") == needed(hub.folder / "org/expert", ("attn",)) - 2 * 4000


@pytest.mark.parametrize("fault", ["changed", "longer"])
def test_a_file_that_changes_between_requests(fault: str, hub: LoopbackHub, tmp_path: Path) -> None:
    with open_checkpoint("org/expert"), open_checkpoint("org/base"):
        pass
    hub.faults.append(fault)
    with pytest.raises(CheckpointError, match=r"org/(?:expert|base)@0123.*: has changed since parts .* retry"):
        build(hub, tmp_path / "prior")
    assert not list(tmp_path.glob("prior*"))
    assert build(hub, tmp_path / "prior").fingerprint == expected(hub, tmp_path).fingerprint


def test_other_bytes_behind_the_same_name(hub: LoopbackHub, tmp_path: Path) -> None:
    """A mirror, say, that knows no commits: what is held of the old file is not mixed with the new one."""
    build(hub, tmp_path / "prior")
    weights = tuned(text_weights(layers=6))
    save_file(weights, hub.folder / "org/expert/model.safetensors")
    with pytest.raises(CheckpointError, match="file on the Hub has changed"):
        build(hub, tmp_path / "mlp", ["mlp"])
    assert build(hub, tmp_path / "mlp", ["mlp"]).fingerprint == expected(hub, tmp_path, ["mlp"]).fingerprint
    assert build(hub, tmp_path / "prior").fingerprint == expected(hub, tmp_path).fingerprint


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            "elsewhere",
            r"org/expert@0123456789ab: model.safetensors: requested bytes from 0 on, but the server sends",
        ),
        ("404", r"org/expert@0123456789ab: model.safetensors: cannot be fetched from the Hub .*404"),
        ("416", r"org/expert@0123456789ab: model.safetensors: cannot be fetched from the Hub .*416"),
    ],
)
def test_answers_that_make_no_sense(fault: str, words: str, hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.append(fault)
    with pytest.raises(CheckpointError, match=words):
        build(hub, tmp_path / "prior")


def test_a_server_that_sends_whole_files_only(
    hub: LoopbackHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are downloaded as the Hub's client does, and a warning says so."""
    hub.ranges = False
    prior = build(hub, tmp_path / "prior")
    assert prior.fingerprint == expected(hub, tmp_path).fingerprint
    for repository in ("org/expert", "org/base"):
        said = [record.getMessage() for record in caplog.records if repository in record.getMessage()]
        assert said == [f"{repository}: downloading whole files, because the server does not send parts of files"]


def test_without_a_network(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is here is enough, or an error says what is missing."""
    prior = build(hub, tmp_path / "prior")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    hub.asked.clear()
    assert build(hub, tmp_path / "again").fingerprint == prior.fingerprint
    with pytest.raises(
        CheckpointError, match=r"org/expert@0123.*cannot be fetched from the Hub \(OfflineModeIsEnabled"
    ):
        build(hub, tmp_path / "mlp", ["mlp"])
    with pytest.raises(CheckpointError, match="org/other: no such folder, and cannot be fetched from the Hub"):
        open_checkpoint("org/other")
    assert not hub.asked


@pytest.mark.parametrize("repository", ["org/base", "org/expert"])
def test_what_the_hub_s_cache_has_is_used(repository: str, hub: LoopbackHub, tmp_path: Path) -> None:
    snapshot_download(repository)
    before = hub.bytes_asked(repository)
    assert build(hub, tmp_path / "prior").fingerprint == expected(hub, tmp_path).fingerprint
    assert hub.bytes_asked(repository) == before
    assert not list((tmp_path / "assets").rglob(f"{repository.replace('/', '--')}/*/*.safetensors"))


def test_a_part_of_it_in_the_hub_s_cache(hub: LoopbackHub, tmp_path: Path) -> None:
    snapshot_download("org/base", allow_patterns=["*-00002-of-*"])
    hub.asked.clear()
    assert build(hub, tmp_path / "prior").fingerprint == expected(hub, tmp_path).fingerprint
    assert hub.in_parts("org/base") == {f"model-0000{i}-of-00003.safetensors" for i in (1, 3)}


def test_check_reads_headers_only(hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected(hub, tmp_path)
    assert main(["check", str(tmp_path / "expected"), "--model", "org/base"]) == 0
    assert hub.bytes_asked("org/base") == needed(hub.folder / "org/base", ())


def test_a_list_of_what_is_held_that_cannot_be_read_holds_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    build(hub, tmp_path / "prior")
    for path in (tmp_path / "assets").rglob("*.safetensors.json"):
        path.write_text(path.read_text()[:-30])
    hub.asked.clear()
    assert build(hub, tmp_path / "prior").fingerprint == expected(hub, tmp_path).fingerprint
    assert hub.bytes_asked("org/base") == needed(hub.folder / "org/base", ("attn",))


def test_nothing_is_read_that_is_not_there(hub: LoopbackHub) -> None:
    """Nobody said before which tensors would be read, and many threads read at once."""
    weights: dict[str, Tensor] = {}
    with open_checkpoint("org/expert") as checkpoint, open_checkpoint(hub.folder / "org/expert") as local:
        weights = {name: local.read(tensor) for name, tensor in local.tensors.items()}

        def differs(item: tuple[str, Source]) -> bool:
            return not torch.equal(checkpoint.read(item[1]), weights[item[0]])

        with ThreadPoolExecutor(8) as pool:
            assert not any(pool.map(differs, checkpoint.tensors.items()))
        for tensor in checkpoint.tensors.values():
            assert not next(tensor.places()).path.exists()  # nor is it found where it would be read unnoticed


def test_an_adapter_on_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    """Of the base what is asked for, and the adapter whole."""
    adapter = hub.folder / "org/adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    parts = {f"{name}.lora_A.weight": torch.randn(2, 31), f"{name}.lora_B.weight": torch.randn(33, 2)}
    save_file(parts, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    (adapter / "optimizer.pt").write_text("large")
    prior = build_prior(
        "org/base@v1+org/adapter@main", "org/base", tmp_path / "prior", modules=["attn"], dtype=torch.float32
    )
    change = parts[f"{name}.lora_B.weight"] @ parts[f"{name}.lora_A.weight"] * 2
    assert torch.allclose(prior.load("layers.1.self_attn.q_proj.weight"), change, rtol=1e-5, atol=1e-5)
    assert prior.record["sources"]["expert"]["name"] == "org/base@v1+org/adapter@main"
    assert hub.bytes_asked("org/base") == needed(hub.folder / "org/base", ("attn",))
    assert hub.fetched("org/adapter") == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(CheckpointError, match=r"org/adapter: expected .* on the Hub, found a PEFT .*BASE\+ADAPTER"):
        open_checkpoint("org/adapter")


def test_the_token_stays_with_the_hub(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with open_checkpoint("org/expert"):
        pass
    at_the_bytes = [h for asked, h in zip(hub.asked, hub.headers, strict=True) if asked.range]
    assert at_the_bytes
    assert not any("authorization" in headers for headers in at_the_bytes)
    assert any(headers.get("authorization") == "Bearer hf_secret" for headers in hub.headers)


def test_the_command_with_another_endpoint(hub: LoopbackHub, tmp_path: Path) -> None:
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    env = {key: value for key, value in env.items() if key not in ("HF_HUB_CACHE", "HF_ASSETS_CACHE")}
    command = [sys.executable, "-m", "drift_kernels.cli", "build", "--expert", "org/expert@main", "--base", "org/base"]
    done = subprocess.run(
        [*command, "--modules", "attn", "--out", str(tmp_path / "prior")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Prior.open(tmp_path / "prior").fingerprint == expected(hub, tmp_path).fingerprint
    assert list((tmp_path / "home/assets/drift_kernels/org--expert" / COMMIT).glob("model.safetensors"))
