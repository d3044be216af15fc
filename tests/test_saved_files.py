"""Priors and state_dicts that an earlier version wrote: they open, and runs go on from them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from drift_kernels import BackendUnavailableError, Prior, PriorMismatchError

SAVED = Path(__file__).parent / "data" / "written_by_0.1.0"


def _writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("written_by_0_1_0", SAVED / "write.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


writer = _writer()
EXPECTED = json.loads((SAVED / "expected.json").read_text())
WITH_A_PRIOR = [name for name, run in writer.RUNS.items() if run.prior]


def saved(name: str) -> dict[str, Any]:
    return torch.load(SAVED / f"{name}.pt", weights_only=True)


def fresh(name: str, backend: str = "reference") -> Any:
    """A run that has not begun, with other hyperparameters than the saved one, which brings its own."""
    run = writer.RUNS[name]
    try:
        return writer.Training(run, backend, writer.prior_of(run, SAVED), groups=({}, {"lr": 0.5}))
    except BackendUnavailableError as error:
        pytest.skip(str(error))


def called_as_then(key: str) -> str:
    """The key that a state had when the files were written: codes had those of moments."""
    return key.removesuffix("_codes")


# Priors


@pytest.mark.parametrize("name", writer.PRIORS)
def test_a_prior_opens_and_is_what_it_was(name: str) -> None:
    """Its fingerprint, what it knows of its deltas, their bits, and how it covers a model."""
    prior = Prior.open(SAVED / name)
    assert prior.record == json.loads((SAVED / name / "drift_prior.json").read_text())
    found = writer.described(prior, writer.PRIORS[name].shapes)
    assert found == EXPECTED["priors"][name]
    assert found["coverage"]["matched"]


@pytest.mark.parametrize("name", writer.PRIORS)
def test_a_prior_without_checksums_is_verified_by_its_norms(name: str) -> None:
    prior = Prior.open(SAVED / name)
    verification = prior.verify()
    assert verification.intact
    assert (verification.by_checksum, verification.by_norm) == (0, len(prior))


def test_every_dtype_of_priors_is_there() -> None:
    dtypes = {json.loads((SAVED / name / "drift_prior.json").read_text())["dtype"] for name in EXPECTED["priors"]}
    assert dtypes == {"float32", "bfloat16", "int8", "float8_e4m3fn"}


def test_the_same_checkpoints_give_the_same_priors(tmp_path: Path) -> None:
    """Fingerprints and bits; the last digits of norms may be the machine's."""
    for name, found in writer.write_priors(tmp_path).items():
        for key in ("fingerprint", "deltas", "coverage"):
            assert found[key] == EXPECTED["priors"][name][key], name


# Runs


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", writer.RUNS)
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(name: str, backend: str) -> None:
    """In the bits of the version that began it; within 1e-6 of each tensor's largest element where sums decide."""
    training = fresh(name, backend)
    training.load_state_dict(saved(name))
    training.steps(writer.SAVED_AFTER, writer.ALL_STEPS)
    found = {called_as_then(key): tensor for key, tensor in training.tensors().items()}
    expected = EXPECTED["runs"][name]
    assert training.scheduled() == expected["scheduled"]
    assert found.keys() == expected["tensors"].keys()
    if writer.RUNS[name].bitwise:
        for key, tensor in found.items():
            assert writer.digest(tensor) == expected["tensors"][key], key
        return
    for key, tensor in torch.load(SAVED / f"{name}_afterwards.pt", weights_only=True).items():
        assert found[key].dtype == tensor.dtype
        assert (found[key] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), key


@pytest.mark.parametrize("name", writer.RUNS)
def test_a_run_begun_anew_is_the_same(name: str) -> None:
    """Without the files: what went before they were saved gives the same, too."""
    run = writer.RUNS[name]
    training = writer.Training(run, "reference", writer.prior_of(run, SAVED))
    training.steps(0, writer.SAVED_AFTER)
    for key, tensor in saved(name)["params"].items():
        if run.bitwise:
            assert writer.digest(training.params[key]) == writer.digest(tensor), key
        else:
            torch.testing.assert_close(training.params[key].detach(), tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", writer.RUNS)
def test_what_was_loaded_is_saved_again(name: str) -> None:
    """Hyperparameters, fingerprint, seed and every state, but that codes have keys of their own now; keys may come with
    later versions, none may go."""
    training, before = fresh(name), saved(name)
    training.load_state_dict(before)
    after = training.state_dict()
    for old, new in zip(before["optimizer"]["param_groups"], after["optimizer"]["param_groups"], strict=True):
        assert {key: new[key] for key in old} == old
    assert after["optimizer"]["state"].keys() == before["optimizer"]["state"].keys()
    for index, state in before["optimizer"]["state"].items():
        found = after["optimizer"]["state"][index]
        assert all(key.endswith("_codes") for key, t in found.items() if t.dtype in (torch.int8, torch.uint8))
        assert {called_as_then(key): writer.digest(tensor) for key, tensor in found.items()} == {
            key: writer.digest(tensor) for key, tensor in state.items()
        }, index
    assert after["alpha_schedule"] == before["alpha_schedule"]
    assert before["lr_schedule"].items() <= after["lr_schedule"].items()


@pytest.mark.parametrize("name", WITH_A_PRIOR)
def test_a_run_under_a_prior_loads_under_no_other(name: str) -> None:
    run = writer.RUNS[name]
    assert {group["prior_fingerprint"] for group in saved(name)["optimizer"]["param_groups"]} != {None}
    other = {key: torch.ones(shape) for key, shape in run.shapes.items() if "layers" in key}
    for prior in (other, None):
        training = writer.Training(run, "reference", prior)
        with pytest.raises(PriorMismatchError, match="saved with the prior"):
            training.optimizer.load_state_dict(saved(name)["optimizer"])
        assert not training.optimizer.state


def test_the_runs_hold_what_can_be_saved() -> None:
    """Scales of codes row by row and flat, residuals, a parameter without a state, tensors as hyperparameters."""
    states = {name: saved(name)["optimizer"]["state"] for name in writer.RUNS}
    for name, shape in (("masters_int8", (32, 1)), ("int8", (35,))):
        found = {tuple(state["exp_avg_scale"].shape) for state in states[name].values() if "exp_avg_scale" in state}
        assert found == {shape}
    assert all(state["param_residual"].dtype == torch.int16 for state in states["masters"].values())
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in states["bfloat16_stochastic"].values())
    assert len(states["float32"]) == len(writer.SMALL) - 1
    assert {float(state["step"]) for state in states["float32"].values()} == {2.0, 3.0}
    group = saved("float16_with_a_mapping")["optimizer"]["param_groups"][0]
    assert isinstance(group["lr"], torch.Tensor)
    assert isinstance(group["alpha"], torch.Tensor)
