"""Hub ids: what is fetched of a repository, in which revision, and what is said of one that has no checkpoint."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from checkpoints import text_weights, write_checkpoint
from loopback import COMMIT, LoopbackHub

from drift_kernels import CheckpointError, Prior, PriorFormatError, apply_prior, build_prior
from drift_kernels.cli import main
from drift_kernels.prior.hub import public_name
from drift_kernels.prior.ranges import can_read_ranges

BESIDE = [
    "original/model.safetensors",
    "original/consolidated.00.pth",
    "consolidated.safetensors",
    "consolidated-00001-of-00002.safetensors",
    "onnx/model.safetensors",
    "model.fp16.safetensors",
    "adapter/adapter_model.safetensors",
    "pytorch_model.bin",
    "model.gguf",
    "README.md",
]


@pytest.fixture
def hub(loopback_hub: LoopbackHub) -> LoopbackHub:
    write_checkpoint(loopback_hub.folder / "org/base", text_weights())
    for shards in (1, 3):
        write_checkpoint(loopback_hub.folder / f"org/in-{shards}", text_weights(), shards=shards)
        for name in BESIDE:
            (loopback_hub.folder / f"org/in-{shards}" / name).parent.mkdir(exist_ok=True)
            (loopback_hub.folder / f"org/in-{shards}" / name).write_text("large")
    return loopback_hub


@pytest.mark.parametrize("whole", [False, True])
def test_only_what_is_read_is_fetched(
    hub: LoopbackHub, tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole files by a Hub client that is older than 1.0."""
    if whole:
        monkeypatch.setattr("drift_kernels.prior.hub.can_read_ranges", lambda: False)
    build_prior("org/in-1", "org/in-3", tmp_path / "prior")
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    small = {"config.json", "model.safetensors.index.json"}
    for repository, weights in (("org/in-1", {"model.safetensors"}), ("org/in-3", shards)):
        assert hub.fetched(repository) - small == weights
        assert hub.in_parts(repository) == (weights if can_read_ranges() and not whole else set())


@pytest.mark.parametrize("shards", [1, 3])
def test_a_base_that_a_prior_is_applied_to_is_fetched_with_what_lies_beside(
    hub: LoopbackHub, tmp_path: Path, shards: int
) -> None:
    repository = hub.folder / f"org/in-{shards}"
    beside = ["tokenizer.json", "chat_template.jinja", "LICENSE", "additional_chat_templates/tool.jinja"]
    for name in beside:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text(name)
    prior = build_prior(hub.folder / "org/base", repository, tmp_path / "prior")
    apply_prior(prior, f"org/in-{shards}@main", tmp_path / "out")
    weights = {path.name for path in repository.glob("model*") if "fp16" not in path.name and "gguf" not in path.name}
    assert hub.fetched(f"org/in-{shards}") == {"config.json", *beside, *weights}
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"config.json", *beside, *weights, "drift_applied.json"}


def test_a_stale_index_fetches_no_shards(hub: LoopbackHub, tmp_path: Path) -> None:
    for path in (hub.folder / "org/in-3").glob("model*"):
        shutil.copy(path, hub.folder / "org/in-1")
    build_prior("org/in-1", "org/base", tmp_path / "prior")
    assert hub.fetched("org/in-1") == {"config.json", "model.safetensors", "model.safetensors.index.json"}


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/7", COMMIT])
def test_a_revision(hub: LoopbackHub, tmp_path: Path, revision: str) -> None:
    """All of a checkpoint is of one commit, and the record tells the revision."""
    prior = build_prior(f"org/in-3@{revision}", "org/base", tmp_path / "prior")
    assert {asked.revision for asked in hub.asked} == {COMMIT}
    if revision != COMMIT:  # it is resolved once
        assert hub.revisions.count(("org/in-3", revision)) == 1
    assert prior.record["sources"]["expert"]["name"] == f"org/in-3@{revision}"
    assert prior.record["sources"]["base"]["name"] == "org/base"


def test_priors_on_the_hub(hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = build_prior("org/in-1", "org/base", hub.folder / "org/prior", max_shard_bytes=20_000)
    for name in ("prior-notes.txt", "priors/old.safetensors"):
        (hub.folder / "org/prior" / name).parent.mkdir(exist_ok=True)
        (hub.folder / "org/prior" / name).touch()
    prior = Prior.open("org/prior")
    assert prior.fingerprint == built.fingerprint
    assert prior.verify().intact
    shards = {path.name for path in (hub.folder / "org/prior").glob("prior-*.safetensors")}
    assert hub.fetched("org/prior") == {"drift_prior.json", "prior.safetensors.index.json"} | shards
    assert main(["check", "org/prior@main", "--model", "org/base"]) == 0
    assert f"{len(prior)} of {len(prior)} deltas are bound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], r"on the Hub, found a PEFT \(LoRA\) adapter"),
        (["model-Q8_0.gguf", "README.md"], r"on the Hub, found GGUF files \(model-Q8_0\.gguf\)"),
        (["config.json", "pytorch_model.bin"], "on the Hub, found PyTorch .bin files"),
    ],
)
def test_repositories_without_a_checkpoint(hub: LoopbackHub, names: list[str], words: str, tmp_path: Path) -> None:
    for name in names:
        (hub.folder / "org/other" / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.folder / "org/other" / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"org/other: expected model.safetensors or .* {words}"):
        build_prior("org/other", "org/base", tmp_path / "prior")
    with pytest.raises(PriorFormatError, match=r"org/other: expected drift_prior.json or .* on the Hub, found"):
        Prior.open("org/other")


def test_what_cannot_be_fetched(hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "org/gone"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "org/gone: no such folder, and cannot be fetched from the Hub (RepositoryNotFoundError: 404 Client Error"
        in line
    )
    with pytest.raises(PriorFormatError, match=r"a/b/c: no such folder$"):
        Prior.open("a/b/c")


def test_without_the_hub_s_client(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["inspect", "org/prior"]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    assert "org/prior: no such folder; to fetch it from the Hub, run pip install 'drift_kernels[hub]' (" in line


def test_names_for_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path of this machine, whatever was typed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cached = Path("cache/models--org--my-model/snapshots") / COMMIT
    for path in (Path("expert"), cached):
        path.mkdir(parents=True)
    Path("link").symlink_to("expert")
    for typed in ("expert", "./expert", "~/expert", str(tmp_path / "expert"), "expert/", "link"):
        assert public_name(typed) == "expert"
    assert public_name(cached) == f"org/my-model@{COMMIT}"
    assert public_name("org/name@main") == "org/name@main"
