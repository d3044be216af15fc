"""drift-prior: arguments, exit status and output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import text_weights, write_checkpoint
from matplotlib.image import imread

from drift_kernels import Prior
from drift_kernels.cli import main
from drift_kernels.prior.names import module_of
from drift_kernels.prior.plot import projection_lines
from drift_kernels.prior.summary import group_deltas


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "expert", text_weights())
    vision = {"vision_tower.encoder.layers.0.self_attn.q_proj.weight": torch.randn(3, 3)}
    write_checkpoint(tmp_path / "base", text_weights(prefix="language_model.model.") | vision, shards=2)
    return tmp_path


def build(folder: Path, *options: str) -> int:
    paths = ("--expert", folder / "expert", "--base", folder / "base", "--out", folder / "prior")
    return main(["build", *map(str, paths), *options])


def one_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    return lines[0]


def test_build_then_inspect_then_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(folder, "--modules", "attn,norms,embed", "--layers", "0,2", "--dtype", "fp32") == 0
    prior = Prior.open(folder / "prior")
    assert f"{len(prior)} deltas" in one_line(capsys.readouterr().out)
    assert prior.record["modules"] == ["attn", "norms", "embed"]
    assert prior.record["layers"] == [0, 2]
    assert prior.info("norm.weight").dtype == torch.float32

    assert main(["inspect", str(folder / "prior"), "--plot", str(folder / "plot.png")]) == 0
    printed = capsys.readouterr().out
    attention = group_deltas(prior, module_of)["attn"]
    assert 1.2 < attention.ratio < 1.6, "two independent normal models are sqrt(2) apart"
    assert "expert - base: expert expert, base base" in printed
    rows = [line for line in printed.splitlines() if "attn" in line]
    assert len(rows) == 2
    assert " 5 " in rows[0], "four projections and a bias"
    cells = [tuple(cell.strip() for cell in line.split("│")[:2]) for line in printed.splitlines() if "│" in line]
    modules = [("", "embed"), ("0", "norm"), ("", "attn"), ("2", "norm"), ("", "attn"), ("", "norm")]
    assert cells == modules, "a layer's number stands in its first row"
    image = imread(folder / "plot.png")
    assert image.shape[1] > 1000
    assert image[..., :3].std() > 0.05

    assert main(["check", str(folder / "prior"), "--model", str(folder / "base")]) == 0
    printed = capsys.readouterr().out
    assert f"{len(prior)} of {len(prior)} deltas are bound" in printed
    assert "16 parameters have no delta" in printed


@pytest.mark.parametrize(("option", "dtype"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_a_prior_in_eight_bits(
    folder: Path, option: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(folder, "--dtype", option) == 0
    prior = Prior.open(folder / "prior")
    assert {prior.info(name).dtype for name in prior.names} == {dtype}
    assert not any("scales" in name for name in prior.names)

    capsys.readouterr()
    assert main(["inspect", str(folder / "prior")]) == 0
    printed = capsys.readouterr().out
    assert prior.record["dtype"] in printed
    worst = min(prior.info(f"layers.1.mlp.{p}_proj.weight").stored_cosine for p in ("gate", "up", "down"))
    assert group_deltas(prior, lambda name: name.startswith("layers.1.mlp."))[True].stored_cosine == worst
    assert [line.split()[-1] for line in printed.splitlines() if "mlp" in line][1] == f"{worst:.6f}"
    assert "…" not in printed, "the table fits 80 columns"

    assert main(["check", str(folder / "prior"), "--model", str(folder / "base")]) == 0
    assert f"{len(prior)} of {len(prior)} deltas are bound" in capsys.readouterr().out

    assert build(folder, "--overwrite") == 0
    capsys.readouterr()
    assert main(["inspect", str(folder / "prior")]) == 0
    assert "worst" not in capsys.readouterr().out


def test_check_of_a_model_that_does_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(folder) == 0
    write_checkpoint(folder / "shallow", text_weights(layers=2))
    capsys.readouterr()
    assert main(["check", str(folder / "prior"), "--model", str(folder / "shallow")]) == 1
    captured = capsys.readouterr()
    assert "16 of 24 deltas are bound" in captured.out
    assert "8 deltas have no parameter: layers.2." in captured.out
    assert not captured.err


def test_groups_add_up(folder: Path) -> None:
    """The norms of a group are those of its concatenated tensors; its cosine is within 1% of theirs."""
    assert build(folder, "--dtype", "fp32") == 0
    prior = Prior.open(folder / "prior")
    group = group_deltas(prior, lambda name: module_of(name) if module_of(name) == "mlp" else None)["mlp"]
    names = [name for name in prior.names if ".mlp." in name]
    delta = torch.cat([prior.load(name).double().flatten() for name in names])
    assert group.tensors == len(names) == 9
    assert group.delta_norm == pytest.approx(delta.norm().item(), rel=1e-6)
    assert group.param_norm == pytest.approx(sum(prior.info(name).param_norm ** 2 for name in names) ** 0.5)
    assert group.ratio == pytest.approx(group.delta_norm / group.param_norm)
    mean = sum(prior.info(name).cosine for name in names) / len(names)
    assert group.cosine == pytest.approx(mean, abs=0.01)


def test_lines_of_the_plot(folder: Path) -> None:
    assert build(folder, "--modules", "attn,mlp,norm") == 0
    prior = Prior.open(folder / "prior")
    lines = projection_lines(prior)
    assert {label for module, label in lines if module == "attn"} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(lines["mlp", "up_proj"]) == {0, 1, 2}
    info = prior.info("layers.1.self_attn.q_proj.weight")
    assert lines["attn", "q_proj"][1].ratio == pytest.approx(info.delta_norm / info.param_norm)


def test_overwrite_regex_reference_and_name_map(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(folder) == 0
    capsys.readouterr()
    assert build(folder) == 1
    assert "already exists" in one_line(capsys.readouterr().err)
    write_checkpoint(folder / "reference", text_weights())
    modules = r"norms,re:(q|v)_proj\.\w{4,6}$"
    options = ["--overwrite", "--modules", modules, "--reference", str(folder / "reference")]
    assert build(folder, *options, "--name-map", "trunk.=layers.", "--name-map", "tower.=") == 0
    prior = Prior.open(folder / "prior")
    assert prior.record["name_map"] == {"trunk.": "layers.", "tower.": ""}
    assert prior.record["delta"] == "expert - reference"
    assert len(prior) == 3 * (1 + 2) + 1 + 3
    assert build(folder, "--overwrite", "--modules", r"re:layers.0.*q_proj,re:mlp\.up_proj$", "--no-bias") == 0
    prior = Prior.open(folder / "prior")
    ups = [f"layers.{layer}.mlp.up_proj.weight" for layer in (0, 1, 2)]
    assert set(prior.names) == {"layers.0.self_attn.q_proj.weight", *ups}
    assert prior.record["modules"] == ["re:layers.0.*q_proj", r"re:mlp\.up_proj$"]
    assert prior.record["include_bias"] is False


def test_warnings_reach_the_terminal_and_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(folder / "wide", text_weights(vocabulary=150))
    paths = ("--expert", folder / "wide", "--base", folder / "base", "--out", folder / "prior")
    assert main(["build", *map(str, paths), "--modules", "embed"]) == 0
    assert "vocabularies differ" in capsys.readouterr().err
    assert main(["inspect", str(folder / "prior")]) == 0
    assert "warning: vocabularies differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "{}/expert"], "not a prior"),
        (["inspect", "{}/nowhere"], "nowhere: no such folder"),
        (["check", "{}/prior", "--model", "{}/nowhere"], "nowhere: no such folder"),
        (["build", "--expert", "{}/nowhere", "--base", "{}/base", "--out", "{}/new"], "nowhere: no such folder"),
        (["build", "--expert", "{}", "--base", "{}/base", "--out", "{}/new"], "expected model.safetensors or"),
        (["inspect", "{}/prior", "--plot", "{}/prior/none/x.png"], "No such file"),
    ],
)
def test_failures_print_one_line_and_return_1(
    folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(folder) == 0
    capsys.readouterr()
    assert main([argument.format(folder) for argument in arguments]) == 1
    assert words in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--layers", "3-1", "layers must be numbers and ranges"),
        ("--modules", "attention", "modules must be any of"),
        ("--modules", "re:(", "not a valid regular expression"),
        ("--dtype", "fp4", "invalid choice"),
        ("--name-map", "trunk", "expected PREFIX=CANONICAL"),
    ],
)
def test_usage_errors_exit_with_2(
    folder: Path, option: str, value: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        build(folder, option, value)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
