"""The output of drift-prior: for terminals of 80 columns, for pipes, and as JSON."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import text_weights, tuned, write_checkpoint
from rich.table import Table

from drift_kernels import Prior, build_prior
from drift_kernels.cli import main
from drift_kernels.prior import Verification
from drift_kernels.prior.names import module_of
from drift_kernels.prior.summary import Group, group_deltas
from drift_kernels.terminal import console

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = text_weights(layers=12, vocabulary=113)
    expert = tuned(base)
    expert["model.embed_tokens.weight"] = expert["model.embed_tokens.weight"][:101].clone()
    write_checkpoint(tmp_path / "expert", expert)
    write_checkpoint(tmp_path / "base", {f"language_model.{name}": weight for name, weight in base.items()})
    modules = ("attn", "mlp", "norms", "embed", "re:gain")
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=torch.int8, modules=modules)
    return tmp_path


def piped(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from drift_kernels.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def on_stdout(capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == status
    captured = capsys.readouterr()
    assert not captured.err
    return json.loads(captured.out)


@pytest.mark.parametrize("columns", ["80", "40"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_pipe_gets_whole_rows_whatever_the_terminal(folder: Path, columns: str, encoding: str) -> None:
    done = piped("inspect", folder / "prior", COLUMNS=columns, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert "…" not in done.stdout
    assert "\x1b" not in done.stdout
    prior = Prior.open(folder / "prior")
    groups = group_deltas(prior, module_of)
    assert max(map(len, done.stdout.splitlines()[3:])) <= 80
    for module in groups:
        rows = [line for line in done.stdout.splitlines()[3:] if module in line.split()]
        assert len(rows) == (1 if module == "embed" else 12 + (module == "norm"))
        assert all(row.split()[-1].count(".") == 1 for row in rows)
    warning = f"warning: {prior.record['warnings'][0]}"
    assert warning in done.stdout.splitlines()


def test_a_narrow_terminal_gets_every_digit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich assume a terminal
    monkeypatch.setenv("COLUMNS", "50")
    assert main(["inspect", str(folder / "prior")]) == 0
    assert "…" not in capsys.readouterr().out


def test_warnings_in_a_pipe_are_a_line_each(folder: Path) -> None:
    paths = ("--expert", folder / "expert", "--base", folder / "base", "--out", folder / "other")
    done = piped("build", *paths, "--modules", "embed", COLUMNS="40")
    (line,) = done.stderr.splitlines()
    assert line.startswith("drift-prior: warning: vocabularies differ (base 113, expert 101 rows): embed and head")
    assert line.endswith("zero elsewhere")
    assert len(done.stdout.splitlines()) == 1


def test_inspect_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prior = Prior.open(folder / "prior")
    found = on_stdout(capsys, "inspect", folder / "prior", "--json")
    groups = found.pop("groups")
    assert found == {
        "fingerprint": prior.fingerprint,
        "delta": "expert - base",
        "sources": {"expert": "expert", "base": "base"},
        "dtype": "int8",
        "rank": None,
        "kept_energy": None,
        "deltas": len(prior),
        "elements": prior.numel,
        "warnings": prior.record["warnings"],
    }
    assert {"layer", "module", *(field.name for field in fields(Group))} == set(groups[0])
    assert sum(group["tensors"] for group in groups) == len(prior)
    (embed,) = [group for group in groups if group["module"] == "embed"]
    info = prior.info("embed_tokens.weight")
    assert (embed["layer"], embed["delta_norm"], embed["param_norm"]) == (None, info.delta_norm, info.param_norm)
    assert (embed["cosine"], embed["stored_cosine"]) == (pytest.approx(info.cosine), info.stored_cosine)


def test_check_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prior = Prior.open(folder / "prior")
    check = ("check", folder / "prior", "--json")
    found = on_stdout(capsys, *check, "--model", folder / "base", "--verify")
    assert set(found) == {"fingerprint", "coverage", "names", "verification"}
    assert set(found["coverage"]) == {"complete", "matched", "shape_mismatches", "prior_only", "model_only"}
    assert set(found["verification"]) == {"intact", *(field.name for field in fields(Verification))}
    assert found["names"].startswith("by the names on disk, because ")
    assert found["coverage"]["complete"]
    assert len(found["coverage"]["matched"]) == len(prior)
    assert found["verification"] == {"intact": True, "by_checksum": len(prior), "by_norm": 0, "faults": {}}

    write_checkpoint(folder / "other", text_weights(layers=11) | {"model.norm.weight": torch.ones(7)})
    found = on_stdout(capsys, *check, "--model", folder / "other", status=1)
    assert found["verification"] is None
    assert not found["coverage"]["complete"]
    assert ["model.norm.weight", "norm.weight", [7], [31]] in found["coverage"]["shape_mismatches"]
    assert {name.split(".")[1] for name in found["coverage"]["prior_only"]} == {"11"}


def test_check_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(Prior.open(folder / "prior"))
    assert main(["check", str(folder / "prior"), "--verify"]) == 0
    assert capsys.readouterr().out == f"{count} of {count} deltas are intact\n"
    (shard,) = (folder / "prior").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["check", str(folder / "prior"), "--verify", "--model", str(folder / "base")]) == 1
    captured = capsys.readouterr()
    bound, names, verified, fault = captured.out.splitlines()
    assert f"{count} of {count} deltas are bound" in bound
    assert names.startswith("by the names on disk, because ")
    assert f"{count - 1} of {count} deltas are intact" in verified
    assert fault.startswith(f"  {Prior.open(folder / 'prior').names[-1]}: damaged: its checksum is ")
    assert not captured.err
    found = on_stdout(capsys, "check", folder / "prior", "--verify", "--json", status=1)
    assert list(found["verification"]["faults"]) == [Prior.open(folder / "prior").names[-1]]


@pytest.mark.parametrize("json_", [[], ["--json"]])
def test_without_matplotlib(
    folder: Path, json_: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.ticker"):
        monkeypatch.setitem(sys.modules, name, None)
    plot = folder / "plot.png"
    assert main(["inspect", str(folder / "prior"), "--plot", str(plot), *json_]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("drift-prior: plotting a prior requires matplotlib: pip install 'drift_kernels[plot]' (")
    assert not plot.exists()
    if json_:
        json.loads(captured.out)


def test_a_drawing_beside_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = folder / "plot.png"
    assert main(["inspect", str(folder / "prior"), "--plot", str(plot), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["deltas"]
    assert captured.err == f"drift-prior: plot written to {plot}\n"
    assert plot.exists()


@pytest.mark.parametrize("command", [[], ["build"], ["inspect"], ["check"]])
def test_help_tells_the_exit_statuses(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0 on success; 1 on an error" in printed
    assert "2 for invalid arguments" in printed


def test_check_of_nothing_is_a_usage_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["check", str(folder / "prior")])
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert "check needs --model, --verify or both" in captured.err
    assert not captured.out


def test_a_reader_that_has_seen_enough(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # before anything is written
    command = [sys.executable, "-m", "drift_kernels.cli", "inspect", str(folder / "prior")]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_names_are_printed_as_they_are_and_logging_is_left_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are markup to rich."""
    handlers = list(logging.getLogger("drift_kernels").handlers)
    assert main(["inspect", "[red]prior[/red]"]) == 1
    assert capsys.readouterr().err == "drift-prior: [red]prior[/red]: no such folder\n"
    assert logging.getLogger("drift_kernels").handlers == handlers


def test_what_is_no_terminal_is_as_wide_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    table.add_row("x" * 300, "y" * 300)
    console().print(table)
    assert any("x" * 300 in line and "y" * 300 in line for line in capsys.readouterr().out.splitlines())
