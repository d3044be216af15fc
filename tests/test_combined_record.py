"""What the record of a combined prior says, and its fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from merges import EVERYTHING, Family, linear

from drift_kernels import PriorError, combine_priors

BIAS = "layers.1.self_attn.q_proj.bias"


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family.write(tmp_path)


def test_norms_and_record(family: Family) -> None:
    priors = [family.prior(name) for name in "ab"]
    combined = combine_priors(priors, family.folder / "out", weights=[0.7, 0.3], dtype=torch.int8)
    record = combined.record
    assert record["delta"] == "0.7 * prior 1 + 0.3 * prior 2 (linear)"
    assert {role: source["name"] for role, source in record["sources"].items()} == {
        "prior 1": "an open prior",
        "prior 2": "an open prior",
        "base": "base",
    }
    assert record["sources"]["base"] == priors[0].record["sources"]["base"]
    assert record["modules"] == list(EVERYTHING)
    assert record["warnings"] == [f"prior 1, prior 2: {said}" for said in priors[0].record["warnings"]] != []
    for name in combined.names:
        info, exact = combined.info(name), linear([p.load(name) for p in priors], [0.7, 0.3]).flatten()
        stored = combined.load(name).double().flatten()
        assert info.delta_norm == pytest.approx(stored.norm().item(), rel=1e-6)
        assert info.param_norm == priors[0].info(name).param_norm
        assert info.cosine is None
        assert info.stored_cosine == pytest.approx((stored @ exact / stored.norm() / exact.norm()).item(), abs=1e-6)
    assert str(family.folder) not in json.dumps(record)


def test_the_fingerprint_follows_from_all_that_decides(family: Family) -> None:
    priors = [family.prior(name) for name in "ab"]
    cases = [
        {"weights": [0.7, 0.3]},
        {"weights": [0.3, 0.7]},
        {"weights": [0.7, 0.3], "normalize": True},
        {"weights": [0.7, 0.3], "method": "ties", "density": 1.0},
        {"weights": [0.7, 0.3], "method": "ties", "density": 0.5},
        {"weights": [0.7, 0.3], "method": "dare", "density": 0.5},
        {"weights": [0.7, 0.3], "method": "dare", "density": 0.5, "seed": 1},
    ]
    out = family.folder / "out"
    found = [combine_priors(priors, out, overwrite=True, **options).fingerprint for options in cases]
    assert len(set(found)) == len(cases)
    again = combine_priors([family.folder / "prior-a", priors[1]], out, overwrite=True, max_shard_bytes=1, **cases[0])
    assert again.fingerprint == found[0]
    other_seed = combine_priors(priors, out, overwrite=True, seed=1, **cases[0])
    assert other_seed.fingerprint == found[0], "nothing is drawn"


def test_what_any_of_the_priors_was_asked_for(family: Family) -> None:
    without_bias = {name: weight for name, weight in family.weights["b"].items() if name != f"model.{BIAS}"}
    write_checkpoint(family.folder / "d", without_bias)
    first = family.prior("a", modules=("attn",), layers=[2], include_bias=False, name_map={"trunk.": "", "h.": "x."})
    second = family.prior("d", modules=("mlp", "attn"), layers=[1, 0], name_map={"trunk.": ""})
    record = combine_priors([first, second], family.folder / "out", weights=[1, 1]).record
    assert record["modules"] == ["attn", "mlp"]
    assert record["layers"] == [0, 1, 2]
    assert record["include_bias"] is True
    assert record["name_map"] == {"trunk.": "", "h.": "x."}
    assert record["pulled_to_zero"] == [BIAS]
    record = combine_priors([first, family.prior("c")], family.folder / "out", weights=[1, 1], overwrite=True).record
    assert record["layers"] is None
    contrary = family.prior("b", name_map={"h.": "y."})
    with pytest.raises(PriorError, match=r"the priors' name maps disagree: h\. is 'x\.' and 'y\.'"):
        combine_priors([first, contrary], family.folder / "other", weights=[1, 1])
