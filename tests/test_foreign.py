"""What stands in the place of a checkpoint is named, with what to do; and only what is damaged is called so."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest
import torch
import transformers as hf
from checkpoints import TEXT, randomised, text_weights, tuned, write_checkpoint
from safetensors.torch import load_file

from drift_kernels import CheckpointError, Prior, PriorFormatError, build_prior
from drift_kernels.prior import reading
from drift_kernels.prior.reading import OpenFiles

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4949453792\n"
Q_PROJ = "layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, and what was tuned from it."""
    weights = text_weights()
    write_checkpoint(tmp_path / "base", weights)
    write_checkpoint(tmp_path / "tuned", tuned(weights))
    return tmp_path


def fails(folder: Path, expert: str = "expert") -> str:
    with pytest.raises(CheckpointError) as raised:
        build_prior(folder / expert, folder / "base", folder / "prior")
    assert not list(folder.glob("prior*"))
    return str(raised.value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"model.safetensors": POINTER},
            r"model\.safetensors \(135 bytes\): .* a Git LFS pointer: run `git lfs pull`",
        ),
        ({"model.safetensors.index.json": POINTER}, r"index\.json: cannot be read as JSON: a Git LFS pointer"),
        ({"config.json": POINTER}, r"config\.json: cannot be read as JSON: a Git LFS pointer"),
        ({"model.safetensors": "<!DOCTYPE html><html>" + "x" * 99}, "a web page: download the file again"),
        ({"model.safetensors": "GGUF" + "x" * 99}, "not a safetensors file but a GGUF file"),
        (
            {"adapter_model.safetensors": "", "adapter_config.json": "{}"},
            r"a PEFT \(LoRA\) adapter .*pass BASE",
        ),
        ({"adapter_config.json": "{}", "adapter_model.bin": ""}, r"a PEFT \(LoRA\) adapter .*merge_and_unload"),
        ({"model-Q4_K_M.gguf": "GGUF"}, r"found GGUF files \(model-Q4_K_M\.gguf\): use the safetensors checkpoint"),
        ({"pytorch_model.bin": "PK", "config.json": "{}"}, r"found PyTorch \.bin files \(pytorch_model\.bin\)"),
        ({"consolidated.safetensors": "", "params.json": "{}"}, "weights in their authors' format"),
        ({"consolidated.00.pth": ""}, "use the checkpoint for transformers"),
        ({"__0_0.distcp": ""}, "a training checkpoint .*save_pretrained"),
        ({"snapshots/abc/config.json": "", "refs/main": ""}, "a model in the Hub's cache .*the folders in snapshots"),
        ({"notes.txt": ""}, "expected model.safetensors or model.safetensors.index.json, found notes.txt"),
    ],
)
def test_what_lies_in_a_folder(folder: Path, files: dict[str, str], words: str) -> None:
    for name, content in files.items():
        (folder / "expert" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "expert" / name).write_text(content)
    message = fails(folder)
    assert re.search(words, message), message
    assert "damaged" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF" + bytes(99), "expected a folder, found a GGUF file: use the safetensors checkpoint"),
        (POINTER.encode(), "expected a folder, found a Git LFS pointer"),
        (b"{}", "expected a folder, found a file: pass its folder"),
    ],
)
def test_a_file_in_place_of_a_folder(folder: Path, content: bytes, words: str) -> None:
    (folder / "expert").write_bytes(content)
    assert words in fails(folder)
    with pytest.raises(PriorFormatError, match=words):
        Prior.open(folder / "expert")


def test_links_to_nothing(folder: Path) -> None:
    """As the Hub's cache leaves them when blobs were deleted or never arrived."""
    (folder / "single").mkdir()
    (folder / "single" / "model.safetensors").symlink_to("../../blobs/gone")
    assert "found links to files that do not exist (model.safetensors): download the model again" in fails(
        folder, "single"
    )
    write_checkpoint(folder / "sharded", text_weights(), shards=3)
    shard = folder / "sharded" / "model-00002-of-00003.safetensors"
    shard.unlink()
    shard.symlink_to("../../blobs/gone")
    assert f"{shard}: a link to ../../blobs/gone, which does not exist" in fails(folder, "sharded")
    (folder / "all").symlink_to("gone")
    assert "all: a link to gone, which does not exist" in fails(folder, "all")


@pytest.mark.parametrize("stale", ["of other shards", "broken"])
def test_of_a_single_file_and_an_index_transformers_and_we_read_the_first(
    tmp_path: Path, stale: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A smaller model was saved where a sharded one had been, by something that did not clear up."""
    first, second = (randomised(hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT))) for _ in range(2))
    first.save_pretrained(tmp_path / "expert", max_shard_size="50KB")
    index = tmp_path / "expert" / "model.safetensors.index.json"
    second.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "expert" / "model.safetensors")
    if stale == "broken":
        index.write_text("[")
    else:
        assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    zeros = {name: torch.zeros_like(tensor) for name, tensor in second.state_dict().items()}
    write_checkpoint(tmp_path / "base", zeros)
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=torch.float32)
    read = hf.Qwen2ForCausalLM.from_pretrained(tmp_path / "expert").state_dict()
    for name in prior.names:
        assert torch.equal(prior.load(name), second.state_dict()[f"model.{name}"])
        assert torch.equal(prior.load(name), read[f"model.{name}"])
    (message,) = [record.getMessage() for record in caplog.records if record.name == "drift_kernels"]
    assert "reading model.safetensors, as transformers does, and ignoring model.safetensors.index.json next" in message


def test_an_index_of_the_single_file_is_not_stale(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(folder / "base" / "model.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    build_prior(folder / "tuned", folder / "base", folder / "prior")
    assert not caplog.records


# What the system refuses


def refusing(number: int, mark: str) -> Callable[[Path], FileIO]:
    def open_or_refuse(path: Path, *mode: str) -> FileIO:
        if mark in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return FileIO(path, *mode)

    return open_or_refuse


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "no permission to read it"),
        (errno.EPERM, "no permission to read it"),
        (errno.EMFILE, r"too many files are open: raise the limit \(ulimit -n\)"),
        (errno.ENOENT, "does not exist, or not any more"),
        (errno.ESTALE, "cannot be read: Stale file handle"),
    ],
)
def test_files_that_cannot_be_opened(folder: Path, number: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = build_prior(folder / "tuned", folder / "base", folder / "prior")
    monkeypatch.setattr(reading, "FileIO", refusing(number, ".safetensors"))
    with pytest.raises(CheckpointError, match=f"model.safetensors: .*{words}") as of_checkpoint:
        build_prior(folder / "tuned", folder / "base", folder / "other")
    with pytest.raises(PriorFormatError, match=f"{Q_PROJ} of the prior: .*safetensors: .*{words}") as of_prior:
        prior.load(Q_PROJ)
    with pytest.raises(PriorFormatError, match=words) as of_open:
        Prior.open(folder / "prior")
    for raised in (of_checkpoint, of_prior, of_open):
        assert "damaged" not in str(raised.value)
        cause: BaseException | None = raised.value
        while cause.__cause__ is not None:
            cause = cause.__cause__
        assert isinstance(cause, OSError)
        assert cause.errno == number


@pytest.mark.parametrize(
    ("how", "words", "damaged"),
    [
        ("EIO", "cannot be read: Input/output error", False),
        ("nothing", r"cannot be read: got none of its \d+ bytes from \d+ on", False),
        ("truncated", r"damaged: the file ends \d+ bytes too early", True),
    ],
)
def test_reads_that_fail(folder: Path, how: str, words: str, damaged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = build_prior(folder / "tuned", folder / "base", folder / "prior")
    if how == "truncated":  # since it was opened
        (shard,) = (folder / "prior").glob("*.safetensors")
        os.truncate(shard, shard.stat().st_size // 2)
    else:
        begun = os.preadv

        def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            if offset < 1000:
                return begun(descriptor, buffers, offset)
            if how == "EIO":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return 0

        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(CheckpointError, match=f"model.safetensors: {words}"):
            build_prior(folder / "tuned", folder / "base", folder / "other")
        assert not list(folder.glob("other*"))
    last = prior.names[-1]
    with pytest.raises(PriorFormatError, match=f"{last} of the prior: .*: {words}") as raised:
        prior.load(last)
    assert ("damaged" in str(raised.value)) == damaged
    assert ("damaged" in prior.verify().faults[last]) == damaged


def test_a_folder_that_may_not_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "expert").mkdir()

    def refuse(self: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert f"{folder / 'expert'}: no permission to read it" in fails(folder)


def test_what_cannot_be_told_to_be_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = Path.stat

    def refuse(self: Path, **options: bool) -> os.stat_result:
        if self.name == "config.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return stat(self, **options)

    write_checkpoint(folder / "expert", text_weights())
    monkeypatch.setattr(Path, "stat", refuse)
    assert "config.json: no permission to read it" in fails(folder)


def test_open_files_are_few_and_those_used_last(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(4)]
    for path in paths:
        path.write_text(path.name)
    files = OpenFiles(2)
    with files.using(paths[0]) as first, files.using(paths[1]), files.using(paths[2]):
        assert not first.closed, "in use"
    with files.using(paths[2]) as third, files.using(paths[3]) as fourth:
        assert first.closed
        with files.using(paths[3]) as again:
            assert again is fourth
    assert not third.closed
    files.close()
    assert third.closed
    assert fourth.closed
