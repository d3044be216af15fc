"""drift-prior combine and apply: arguments, exit status and output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import tuned, write_checkpoint
from merges import Family
from safetensors.torch import load_file

from drift_kernels import Prior, build_prior
from drift_kernels.cli import main

UP = "layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = Family.write(tmp_path_factory.mktemp("family"))
    for expert in "abc":
        family.prior(expert)
    return family


def combine(family: Family, out: Path, *options: str) -> int:
    priors = [str(family.folder / f"prior-{expert}") for expert in "abc"]
    return main(["combine", *priors, "--out", str(out), *options])


def apply(family: Family, out: Path, *options: str) -> int:
    return main(
        ["apply", str(family.folder / "prior-a"), "--base", str(family.folder / "base"), "--out", str(out), *options]
    )


def test_combine_then_inspect_then_apply(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert combine(family, out, "--weights", "1", "-0.5", ".25", "--dtype", "fp32") == 0
    prior, single = Prior.open(out), [Prior.open(family.folder / f"prior-{expert}") for expert in "abc"]
    assert (
        capsys.readouterr().out
        == f"{out}: {len(prior)} deltas, {prior.numel:,} elements, fingerprint {prior.fingerprint[:12]}\n"
    )
    expected = single[0].load(UP) - 0.5 * single[1].load(UP) + 0.25 * single[2].load(UP)
    assert torch.equal(prior.load(UP), expected)
    assert {source["name"] for source in prior.record["sources"].values()} == {"base", "prior-a", "prior-b", "prior-c"}

    assert main(["inspect", str(out), "--plot", str(tmp_path / "plot.png")]) == 0
    printed = capsys.readouterr().out
    assert "1 * prior 1 + -0.5 * prior 2 + 0.25 * prior 3 (linear): prior 1 prior-a, prior 2 prior-b" in printed
    assert main(["check", str(out), "--model", str(family.folder / "base"), "--verify"]) == 0
    assert "29 of 29 deltas are bound" in capsys.readouterr().out

    merged = tmp_path / "merged"
    assert main(["apply", str(out), "--base", str(family.folder / "base"), "--scale", "-.5", "--out", str(merged)]) == 0
    assert capsys.readouterr().out == f"{merged}: 29 tensors are W + -0.5 * delta, 0 are unchanged\n"
    weight = family.weights["base"][f"model.{UP}"]
    assert torch.equal(load_file(merged / "model.safetensors")[f"model.{UP}"], weight + -0.5 * expected)

    roles = [family.folder / "a", family.folder / "base"]
    build_prior(*roles, tmp_path / "attn", modules=("attn",))
    merged = tmp_path / "attention"
    assert main(["apply", str(tmp_path / "attn"), "--base", str(roles[1]), "--out", str(merged)]) == 0
    assert capsys.readouterr().out == f"{merged}: 15 tensors are W + 1 * delta, 14 are unchanged\n"


@pytest.mark.parametrize("options", [["ties", "--no-normalize"], ["dare", "--seed", "3"], ["dare_ties", "--normalize"]])
def test_methods_and_densities(family: Family, tmp_path: Path, options: list[str]) -> None:
    assert combine(family, tmp_path / "out", "--weights", "1", "1", "1", "--density", ".5", "--method", *options) == 0
    recipe = Prior.open(tmp_path / "out").record["combined"]
    assert recipe["method"] == options[0]
    assert recipe["densities"] == [0.5] * 3
    assert recipe["normalize"] == ("--normalize" in options)
    assert recipe["seed"] == (3 if "--seed" in options else 0)


def test_inspect_where_norms_of_the_base_are_not_known(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "other", tuned(family.weights["base"]))
    build_prior(family.folder / "b", tmp_path / "other", tmp_path / "p")
    paths = [str(family.folder / "prior-a"), str(tmp_path / "p")]
    assert main(["combine", *paths, "--weights", "1", "1", "--out", str(tmp_path / "out"), "--dtype", "int8"]) == 0
    assert "different bases" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "warning: the priors are of different bases" in printed
    (row,) = [line.split("│") for line in printed.splitlines() if "embed" in line and "warning" not in line]
    assert [cell.strip() for cell in row[4:7]] == ["-", "-", "-"]  # norm(W), the ratio, the cosine
    assert main(["inspect", str(tmp_path / "out"), "--json", "--plot", str(tmp_path / "plot.png")]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert all(group["param_norm"] is group["ratio"] is group["cosine"] is None for group in groups)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "1", "1"], "expected a weight for each of the 3 priors, got 2 weights"),
        (["--weights", "0", "0", "0"], "all weights are zero"),
        (["--weights", "1", "nan", "1"], "weights must be finite, got 1 nan 1"),
        (["--weights", "1", "x", "1"], "invalid float value: 'x'"),
        ([], "the following arguments are required: --weights"),
        (["--weights", "1", "1", "1", "--method", "slerp"], "invalid choice: 'slerp'"),
        (["--weights", "1", "1", "1", "--method", "ties"], "ties needs a density"),
        (["--weights", "1", "1", "1", "--density", ".5"], "linear keeps every element"),
        (["--weights", "1", "1", "1", "--method", "dare", "--density", "2"], "above 0 and at most 1, got 2"),
    ],
)
def test_usage_errors_of_combine(
    family: Family, tmp_path: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        combine(family, tmp_path / "out", *options)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", ["0", "nan", "inf", "much"])
def test_usage_errors_of_apply(family: Family, tmp_path: Path, scale: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        apply(family, tmp_path / "out", "--scale", scale)
    assert exit_.value.code == 2
    assert "argument --scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["combine", "{}/base", "--weights", "1"], "not a prior"),
        (["combine", "{}/nowhere", "--weights", "1"], "nowhere: no such folder"),
        (["apply", "{}/base", "--base", "{}/base"], "not a prior"),
        (["apply", "{}/prior-a", "--base", "{}/prior-a"], "expected model.safetensors or"),
        (["apply", "{}/prior-a", "--base", "{}/nowhere"], "nowhere: no such folder"),
    ],
)
def test_failures_print_one_line_and_return_1(
    family: Family, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*(argument.format(family.folder) for argument in arguments), "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert list(tmp_path.iterdir()) == []
