"""Disk errors: file systems without fsync, a full disk, and the file that is named."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch
from checkpoints import text_weights, tuned, write_checkpoint

from drift_kernels import PriorError, build_prior
from drift_kernels.cli import main
from drift_kernels.prior import folders
from drift_kernels.prior.files import TensorFile
from drift_kernels.prior.writing import TensorFileWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = text_weights()
    write_checkpoint(tmp_path / "base", weights)
    write_checkpoint(tmp_path / "expert", tuned(weights))
    return tmp_path


def build(folder: Path) -> int:
    paths = ("--expert", folder / "expert", "--base", folder / "base", "--out", folder / "prior")
    return main(["build", *map(str, paths)])


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENOSYS])
def test_file_systems_without_fsync(
    folder: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with caplog.at_level(logging.DEBUG, "drift_kernels"):
        prior = build_prior(folder / "expert", folder / "base", folder / "prior")
    assert prior.verify().intact
    files = {message.partition(": the file system does not")[0] for message in caplog.messages}
    assert {Path(file).name for file in files} >= {"drift_prior.json", "prior-00001-of-00001.safetensors"}
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


@pytest.mark.parametrize(("call", "number"), [("fsync", errno.EIO), ("pwrite", errno.ENOSPC), ("fsync", errno.EDQUOT)])
def test_other_errors_of_the_disk_name_the_file_and_leave_nothing(
    folder: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    assert build(folder) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert os.strerror(number) in line
    assert "prior-00001-of-00001.safetensors" in line
    assert not list(folder.glob("prior*"))


def test_an_interrupted_build_leaves_nothing(folder: Path) -> None:
    """In a program, where Ctrl-C is an ordinary exception."""

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_prior(folder / "expert", folder / "base", folder / "prior", progress=interrupt)
    assert not list(folder.glob("prior*"))


def test_names_are_brought_to_the_disk_before_and_after_the_folder_has_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(folders, "sync_folder", lambda path: synced.append((path.name, (folder / "prior").exists())))
    build_prior(folder / "expert", folder / "base", folder / "prior")
    (unfinished, before), last = synced
    assert unfinished.startswith("prior.unfinished-")
    assert (before, last) == (False, (folder.name, True))


def test_what_comes_into_the_way_of_a_build_stays(folder: Path) -> None:
    def other(done: int, total: int) -> None:
        (folder / "prior").mkdir(exist_ok=True)
        (folder / "prior" / "notes").write_text("mine")

    with pytest.raises(PriorError, match="prior already exists"):
        build_prior(folder / "expert", folder / "base", folder / "prior", progress=other)
    assert [path.name for path in folder.glob("prior*")] == ["prior"]
    assert (folder / "prior" / "notes").read_text() == "mine"


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_replaced_prior_is_there_before_or_after(folder: Path, renames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted before the old one is moved away, before the new one replaces it, or afterwards."""
    old = build_prior(folder / "expert", folder / "base", folder / "prior")
    write_checkpoint(folder / "new", text_weights())
    rename, count = Path.rename, [0]

    def interrupted(self: Path, target: Path) -> Path:
        count[0] += 1
        if count[0] == 1 + renames and renames < 2:
            raise KeyboardInterrupt
        moved = rename(self, target)
        if count[0] == renames == 2:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_prior(folder / "new", folder / "base", folder / "prior", overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in folder.glob("prior*")] == ["prior"]
    found = type(old).open(folder / "prior")
    assert found.verify().intact
    assert (found.fingerprint == old.fingerprint) == (renames < 2)


def test_the_writer_appends_in_any_turn(tmp_path: Path) -> None:
    layout = {"a": (torch.float32, (5,)), "b": (torch.int8, (3, 2)), "c": (torch.bfloat16, (0,))}
    values = {"a": torch.randn(5), "b": torch.arange(6, dtype=torch.int8)}
    with TensorFileWriter(tmp_path / "x.safetensors", layout) as writer:
        writer.append("b", values["b"][:2])
        writer.append("a", values["a"])
        writer.append("b", values["b"][2:])
        writer.finish()
    tensors = TensorFile.inspect(tmp_path / "x.safetensors").tensors
    assert tensors["a"].offset % 64 == 0
    assert torch.equal(tensors["a"].read(), values["a"])
    assert torch.equal(tensors["b"].read().flatten(), values["b"])
    assert tensors["c"].read().shape == (0,)
