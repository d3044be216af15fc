"""Paths as typed: the working directory and links may change after a prior is opened."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import text_weights, write_checkpoint

from drift_kernels import FusedDriftAdamW, GradientBias, Prior, build_prior

UP = "layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for role in ("expert", "base"):
        write_checkpoint(tmp_path / role, text_weights())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "outputs").mkdir()
    return tmp_path


TYPED = pytest.mark.parametrize("typed", ["prior", "./prior", "../{}/prior", "~/prior", "link"])


@TYPED
def test_a_relative_path_outlives_the_working_directory(
    folder: Path, typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Hydra, which changes it between the optimizer's construction and its first step."""
    expected = build_prior("expert", "~/base", "prior", dtype=torch.float32).load(UP)
    (folder / "link").symlink_to("prior")
    typed = typed.format(folder.name)
    params = {kind: torch.nn.Parameter(torch.zeros(63, 31)) for kind in ("optimizer", "bias")}
    for param in params.values():
        param.grad = torch.zeros_like(param)
    optimizer = FusedDriftAdamW([(UP, params["optimizer"])], prior=typed, prior_scaling="absolute", lr=1.0)
    bias = GradientBias([(UP, params["bias"])], typed, alpha=1.0, prior_scaling="absolute")
    prior = Prior.open(typed)
    monkeypatch.chdir("outputs")
    optimizer.step()
    bias.apply_()
    assert torch.equal(params["bias"].grad, -expected)
    assert torch.equal(params["optimizer"].sign(), expected.sign())
    assert torch.equal(prior.load(UP), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deep", "pickle"])
def test_so_do_its_copies(folder: Path, copied: Callable[[Prior], Prior], monkeypatch: pytest.MonkeyPatch) -> None:
    build_prior("expert", "base", "prior")
    prior = Prior.open("prior")
    monkeypatch.chdir("outputs")
    again = copied(prior)
    assert torch.equal(again.load(UP), prior.load(UP))
    assert again.verify().intact


def test_a_link_that_is_set_to_another_prior_changes_nothing(folder: Path) -> None:
    first = build_prior("expert", "base", "first")
    build_prior("base", "expert", "second")
    (folder / "latest").symlink_to("first")
    prior = Prior.open("latest")
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("second")
    assert torch.equal(prior.load(UP), first.load(UP))


@TYPED
def test_records_hold_no_path_of_the_machine(folder: Path, typed: str) -> None:
    """However the sources were given."""
    (folder / "link").symlink_to("expert")
    typed = typed.format(folder.name).replace("prior", "expert")
    prior = build_prior(typed, folder / "base", "prior")
    assert {role: source["name"] for role, source in prior.record["sources"].items()} == {
        "expert": "expert",
        "base": "base",
    }
    for path in (folder / "prior").iterdir():
        content = path.read_bytes()
        for secret in (str(folder), folder.name, "~", "outputs"):
            assert path.suffix == ".safetensors" or secret.encode() not in content


def test_outputs_may_be_typed_likewise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(build_prior("expert", "base", "~/in/depth")) == len(Prior.open(folder / "in" / "depth"))
    (folder / "store").mkdir()
    (folder / "linked").symlink_to("store")
    build_prior("expert", "base", "linked/prior")
    assert Prior.open(folder / "store" / "prior").verify().intact


def test_a_link_to_a_prior_is_replaced_by_what_it_stands_for(folder: Path) -> None:
    build_prior("expert", "base", "store/first")
    (folder / "latest").symlink_to("store/first")
    again = build_prior("base", "expert", "latest", overwrite=True)
    assert (folder / "latest").is_symlink()
    assert Prior.open("store/first").fingerprint == again.fingerprint
    assert sorted(path.name for path in folder.iterdir()) == ["base", "expert", "latest", "outputs", "store"]
    assert [path.name for path in (folder / "store").iterdir()] == ["first"]


def test_a_build_from_relative_paths_outlives_the_working_directory_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shards are opened as they are needed."""
    for role in ("expert", "base"):
        write_checkpoint(folder / "many" / role, text_weights(layers=8), shards=40)
    monkeypatch.setattr("drift_kernels.prior.checkpoint._OPEN_FILES", 1)
    sources = ("many/expert", "many/base")
    prior = build_prior(*sources, "prior", progress=lambda done, total: monkeypatch.chdir(folder / "outputs"))
    assert prior.verify().intact
    assert not list((folder / "outputs").iterdir())
