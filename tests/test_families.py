"""A few families of every kind: all shared parameters move toward the expert, and nothing else moves.

`python -m tests.families` does the same for every family of transformers (docs/families.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as hf
from families.catalogue import families
from families.check import check
from families.page import counts

FAMILIES = {family.name: family for family in families()}
FULL = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava",
    "internvl",
    "gemma3",
    "paligemma",
    "idefics3",
    "smolvlm",
    "mllama",  # cross-attention layers shift the other layers' numbers
    "mistral3",
    "llama4",  # experts fused everywhere
    "qwen3_omni_moe",  # a talker beside the thinker
    "qwen2_audio",
]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    hf.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("name", FULL)
def test_every_shared_matrix_moves_toward_the_expert(name: str, tmp_path: Path) -> None:
    row = check(FAMILIES[name], tmp_path)
    assert row.verdict == "full", row
    assert row.bound == row.shared >= 8
    assert not row.rest_missed


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_of_experts_that_are_fused_in_memory_none_is_lost_silently(name: str, tmp_path: Path) -> None:
    row = check(FAMILIES[name], tmp_path)
    assert row.verdict in ("full", "partial"), row
    assert not row.silent + row.wrong + row.tower


def test_the_check_sees_each_kind_of_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from families.check import Pair

    step = Pair.attempt

    def spoiled(self: Pair, *arguments: object) -> object:
        attempt = step(self, *arguments)
        if "norms" in arguments[0]:
            return attempt
        names = list(attempt.moves)
        del attempt.moves[names[0]]
        attempt.moves[names[1]] = -attempt.moves[names[1]]
        attempt.moves["model.vision_tower.weight"] = attempt.moves[names[2]]
        return attempt

    monkeypatch.setattr(Pair, "attempt", spoiled)
    row = check(FAMILIES["qwen2_vl"], tmp_path)
    assert row.verdict == "fault"
    assert [len(row.silent), len(row.wrong), row.tower] == [1, 1, ["model.vision_tower.weight"]]
    assert "1 silent misses, 1 wrong signs, 1 tower moves" in counts([row])
