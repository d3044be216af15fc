"""drift-prior memory: the table in docs/priors.md matches the command's output."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from documents import ROOT, commands_in

from benchmarks.step import shapes
from drift_kernels.cli import main

PAGE = ROOT / "docs" / "priors.md"

# The items that each of its columns sums.
COLUMNS = {
    "base": ("base weights", "one of them expanded", "other base weights", "buffers"),
    "adapters, gradients, states": ("adapters", "their gradients", "states"),
    "their deltas": ("their deltas",),
    "prior": ("prior",),
    "projecting": ("projecting",),
}


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f}"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-VL-7B's config.json, reduced to what determines shapes."""
    text, vision = shapes.MODELS["qwen2.5-vl-7b"].text, shapes.VISION
    config = hf.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": text.hidden,
            "intermediate_size": text.intermediate,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.hidden // 128,
            "num_key_value_heads": text.kv // 128,
            "vocab_size": text.vocabulary,
            "tie_word_embeddings": text.tied,
        },
        vision_config={
            "hidden_size": vision.hidden,
            "intermediate_size": vision.intermediate,
            "depth": vision.layers,
            "out_hidden_size": text.hidden,
        },
        tie_word_embeddings=text.tied,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    folder = tmp_path_factory.mktemp("qwen")
    config.save_pretrained(folder)
    return folder


def test_the_documented_table_is_what_the_command_says(qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text()

    def command(*options: str) -> dict[str, Any]:
        (words,) = [line.removeprefix("drift-prior ") for line in commands_in(PAGE, "drift-prior memory")]
        words = words.removesuffix(" --prior-rank 64")
        arguments = [str(qwen) if word == "Qwen/Qwen2.5-VL-7B-Instruct" else word for word in words.split()]
        assert main([*arguments, *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    head, _, *rows = re.search(r"^\| GiB \|.*?\n\n", page, re.MULTILINE | re.DOTALL)[0].strip().splitlines()
    assert head == f"| GiB | {' | '.join(COLUMNS)} | total |"
    assert len(rows) == 4
    for row in rows:
        found = command(*re.search("`(.+)`", row)[1].split())
        items = {item["what"]: item for item in found["items"]}
        assert items.keys() <= {what for column in COLUMNS.values() for what in column}
        cells = []
        for column in COLUMNS.values():
            there = [items[what] for what in column if what in items]
            host = ", host" if any(item["on_host"] for item in there) else ""
            cells.append(gib(sum(item["nbytes"] for item in there)) + host if there else "")
        cells.append(gib(found["device"]) + (f" and {gib(found['host'])}" if found["host"] else ""))
        assert [cell.strip() for cell in row.strip("|").split("|")][1:] == cells

    base = {item["what"]: item["nbytes"] for item in command("--no-prior")["items"]}
    parts = [gib(base[what]) for what in ("base weights", "other base weights", "one of them expanded")]
    assert (
        '"Base" is {} of NF4 with its scales, {} of embeddings, head, norms and biases in bf16, and {} for'.format(
            *parts
        )
        in page
    )
    more = command("--no-prior", "--dtype", "fp32")["device"] - sum(base.values())
    assert f"`--dtype fp32`, {gib(more)} more." in page
