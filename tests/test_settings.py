"""drift_settings: what a trainer's configuration file may say, and what it hears of the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT

from drift_kernels import FusedDriftAdamW
from drift_kernels.integrations import drift_optimizer, drift_settings, settings
from examples import tiny


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("files")
    tiny.write_files(folder)
    return str(folder / "prior")


def test_what_is_set_is_what_the_optimizer_gets(prior: str) -> None:
    given = {
        "prior": prior,
        "alpha": {"attn": "5e-1", "mlp": 2},
        "prior_scaling": "gradnorm",
        "anchor": True,
        "max_grad_norm": "1e0",
        "rounding": None,  # an empty entry in a file
        "anneal": "0.5",
        "refresh": 3,
    }
    taken = drift_settings(given)
    assert taken == {
        **{key: value for key, value in given.items() if key != "rounding"},
        "alpha": {"attn": 0.5, "mlp": 2},
        "max_grad_norm": 1.0,
        "anneal": 0.5,
    }
    del taken["anneal"]
    optimizer = drift_optimizer(tiny.base_model(), **taken)
    assert isinstance(optimizer, FusedDriftAdamW)
    assert optimizer.max_grad_norm == 1
    assert optimizer.param_groups[0]["prior_scaling"] == "gradnorm"
    assert sorted(optimizer.covered_names) == sorted(tiny.expert_prior())


def test_a_home_folder_is_found(prior: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(prior).parent))
    assert drift_settings({"prior": "~/prior"}) == {"prior": prior}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alhpa": 1}, ValueError, "my.drift has unknown keys: alhpa; expected keys among prior, alpha, prior_scaling"),
        ({"lr": 1}, ValueError, "unknown keys: lr"),  # the trainer's own
        ({"prior": None}, ValueError, "my.drift requires `prior`, the folder that `drift-prior build` wrote, got None"),
        ({"prior": ""}, ValueError, "requires `prior`"),
        ({"prior": "nowhere"}, FileNotFoundError, "my.drift.prior: no such folder: 'nowhere'"),
        ({"alpha": "strong"}, ValueError, "my.drift.alpha must be a number, got 'strong'"),
        ({"alpha": {"attn": "strong"}}, ValueError, "my.drift.alpha.attn must be a number, got 'strong'"),
        ({"anneal": 2}, ValueError, "anneal must be a fraction of the training steps, in \\(0, 1\\], got 2"),
        ({"anneal": True}, ValueError, "anneal must be a fraction"),
    ],
)
def test_what_is_wrong_is_named(prior: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        drift_settings({"prior": prior, **change}, "my.drift")


def test_every_key_is_documented() -> None:
    section = (ROOT / "docs" / "trainers.md").read_text().partition("## Settings in a file")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(settings.KEYS)


@pytest.mark.parametrize("given", [None, "prior", ["prior"], 1])
def test_no_mapping_is_an_error(given: Any) -> None:
    with pytest.raises(TypeError, match="drift must be a mapping"):
        drift_settings(given)
