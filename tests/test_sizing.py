"""drift-prior memory: its table matches what tiny models allocate, to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from checkpoints import FAMILIES, TEXT, TRANSFORMERS_5
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers import HfQuantizer

from drift_kernels import FusedDriftAdamW, Prior
from drift_kernels.adapters import Factors, projected
from drift_kernels.cli import main, sizing
from drift_kernels.footprint import FineTuning, table, without_adapters
from drift_kernels.integrations import named_groups
from drift_kernels.prior.deltas import tensors_of
from drift_kernels.prior.in_memory import UnknownModelError, meta_model
from drift_kernels.prior.low_rank import LowRankDelta
from drift_kernels.prior.quantized import quantize
from drift_kernels.state.precision import Precision

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model

from drift_kernels.integrations.peft import lora_prior

RANK = 4
SIZES = {**TEXT, "vocab_size": 101, "hidden_size": 40, "intermediate_size": 72, "head_dim": 10}
PROJECTIONS = r".*\.layers\.\d+\..*_proj"
transformers_5 = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="transformers 4 quantises one Linear more, and fuses no experts"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose sizes are mostly not multiples of a block."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)).bfloat16().save_pretrained(folder)
    return folder


def quantised(bits: int) -> dict[str, Any]:
    """Quantization arguments of from_pretrained."""
    if bits == 16:
        return {"dtype": torch.bfloat16}
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    options = {"load_in_4bit": True, **nf4} if bits == 4 else {"load_in_8bit": True}
    return {"dtype": torch.bfloat16, "quantization_config": hf.BitsAndBytesConfig(**options)}


def deltas(model: nn.Module, form: str) -> dict[str, Any]:
    shapes = {name: p.shape for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    whole = {name: torch.randn(shape) for name, shape in shapes.items()}
    if form == "rank 8":
        factors = {
            name: (torch.randn(m, 8).bfloat16(), torch.randn(8, n).bfloat16()) for name, (m, n) in shapes.items()
        }
        return {name: LowRankDelta(*pair) for name, pair in factors.items()}
    if form == "int8":
        return {name: quantize(delta, torch.int8) for name, delta in whole.items()}
    return {name: delta.bfloat16() for name, delta in whole.items()}


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """The bytes of these tensors' storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors if t is not None}
    return sum(storages.values())


def parts(linear: Linear4bit | Linear8bitLt) -> Iterator[Tensor | None]:
    """The tensors in which bitsandbytes stores the weight of a Linear."""
    yield linear.weight.data
    if isinstance(linear, Linear4bit):
        state = linear.weight.quant_state
        yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    else:
        yield from (linear.weight.SCB, linear.state.SCB, linear.state.CB)


def states(optimizer: torch.optim.Optimizer) -> int:
    return bytes_of(value for state in optimizer.state.values() for key, value in state.items() if key != "step")


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.randint(101, (2, 8))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def sizes(model: nn.Module, how: FineTuning) -> dict[str, int]:
    return {item.what: item.nbytes for item in table(model, how)}


@pytest.mark.parametrize("form", ["bfloat16", "int8", "rank 8"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_adapters_take_what_the_table_says(folder: Path, bits: int, form: str) -> None:
    weights = deltas(hf.Qwen2ForCausalLM.from_pretrained(folder), form)
    base = hf.Qwen2ForCausalLM.from_pretrained(folder, **quantised(bits))
    model = get_peft_model(base, LoraConfig(r=RANK, target_modules=PROJECTIONS))
    prior = lora_prior(model, Prior.from_mapping(weights))
    optimizer = FusedDriftAdamW(named_groups(model), lr=1e-3, prior=prior, state_dtype="int8")
    train(model, optimizer)

    trained = [param for param in model.parameters() if param.requires_grad]
    below = [param for param in model.parameters() if not param.requires_grad]
    linears = [module for module in model.modules() if isinstance(module, (Linear4bit, Linear8bitLt))]
    coded = {id(linear.weight) for linear in linears}
    others = [param for param in below if id(param) not in coded]
    held = bytes_of(part for linear in linears for part in parts(linear))
    expected = {
        "base weights": held if bits < 16 else bytes_of(others),
        "adapters": bytes_of(trained),
        "their gradients": bytes_of(param.grad for param in trained),
        "states": states(optimizer),
        "prior": bytes_of(tensor for delta in weights.values() for tensor in tensors_of(delta)),
        "buffers": bytes_of(model.buffers()),
    }
    if bits < 16:
        expected["other base weights"] = bytes_of(others)
    how = FineTuning(
        rank=RANK,
        base_bits=bits,  # type: ignore[arg-type]
        precision=Precision(torch.int8, False, False),
        prior=torch.int8 if form == "int8" else torch.bfloat16,
        prior_rank=8 if form == "rank 8" else None,
    )
    model_, _ = meta_model(folder)
    found = sizes(model_, how)
    assert {what: found[what] for what in expected} == expected
    elements = sum(param.numel() for param in trained)
    report = {kind: round(share * elements) for kind, share in optimizer.memory_report().items()}
    assert found["prior"] + found["their deltas"] == report["prior"]
    if bits < 16:
        assert found["one of them expanded"] == max(n.in_features * n.out_features for n in linears) * 2


@pytest.mark.parametrize(
    ("dtype", "masters", "form"),
    [(torch.bfloat16, True, "int8"), (torch.float32, False, "int8"), (torch.bfloat16, False, "rank 8")],
)
def test_full_fine_tuning_takes_what_the_table_says(folder: Path, dtype: torch.dtype, masters: bool, form: str) -> None:
    model = hf.Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype)
    biases = {name: torch.randn(param.shape) for name, param in model.named_parameters() if name.endswith("_proj.bias")}
    prior = deltas(model, form) | {
        n: quantize(b, torch.int8) if form == "int8" else b.bfloat16() for n, b in biases.items()
    }
    optimizer = FusedDriftAdamW(named_groups(model), lr=1e-3, prior=prior, master_weights=masters)
    train(model, optimizer)
    params = list(model.parameters())
    how = FineTuning(
        rank=None,
        dtype=dtype,
        precision=Precision(torch.float32, False, masters),
        prior=torch.int8 if form == "int8" else torch.bfloat16,
        prior_rank=8 if form == "rank 8" else None,
    )
    report = {kind: round(n * sum(p.numel() for p in params)) for kind, n in optimizer.memory_report().items()}
    assert sizes(meta_model(folder)[0], how) == {
        "parameters": bytes_of(params),
        "buffers": bytes_of(model.buffers()),
        "gradients": bytes_of(param.grad for param in params),
        "states": states(optimizer),
        "prior": report["prior"] + (report["scales"] if form == "int8" else 0),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_anchor_takes_what_the_table_says(folder: Path, dtype: torch.dtype) -> None:
    model = hf.Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype)
    prior = {name: torch.randn(param.shape) for name, param in model.named_parameters() if "_proj." in name}
    optimizer = FusedDriftAdamW(named_groups(model), lr=1e-3, prior=prior, anchor=True)
    train(model, optimizer)
    found = sizes(meta_model(folder)[0], FineTuning(rank=None, dtype=dtype, prior=torch.float32, anchor=True))
    assert found["targets"] == bytes_of(state.get("prior_target") for state in optimizer.state.values())
    elements = sum(param.numel() for param in model.parameters())
    report = {kind: round(share * elements) for kind, share in optimizer.memory_report().items()}
    assert found["targets"] + found["remaining deltas"] == report["prior"]
    assert found["states"] + found["targets"] == states(optimizer)


def tied() -> hf.PretrainedConfig:
    """A model whose head is not a separate parameter, and not in the last position."""
    return hf.Qwen2Config(**{**SIZES, "tie_word_embeddings": True})


@transformers_5
@pytest.mark.parametrize("family", [*FAMILIES, "tied"])
def test_what_is_quantised_is_what_transformers_quantises(family: str, tmp_path: Path) -> None:
    config = tied() if family == "tied" else FAMILIES[family].config()
    config.architectures = ["Qwen2ForCausalLM" if family == "tied" else FAMILIES[family].model]
    config.save_pretrained(tmp_path)
    model, _ = meta_model(tmp_path)
    (line,) = [item for item in table(model, FineTuning(base_bits=4)) if item.what == "base weights"]
    kept = HfQuantizer.get_modules_to_not_convert(model)
    replaced = replace_with_bnb_linear(model, kept, quantization_config=hf.BitsAndBytesConfig(load_in_4bit=True))
    assert f" {sum(isinstance(module, Linear4bit) for module in replaced.modules())} Linears" in line.how


class LargestOutput(TorchDispatchMode):
    """Records the bytes of the largest newly allocated tensor that an operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out._is_view():
            self.nbytes = max(self.nbytes, out.nbytes)
        return out


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_a_projection_expands_what_the_table_says(form: str) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict()})])})
    rows, columns = 3000, 8192
    delta = torch.randn(rows, columns).bfloat16()
    with torch.device("meta"):
        model["layers"][0]["mlp"]["up_proj"] = nn.Linear(columns, rows, bias=False)
    factors = Factors(torch.randn(2, columns), torch.randn(rows, 2), 1.0)
    stored = quantize(delta, torch.int8) if form == "int8" else delta
    with LargestOutput() as largest:
        projected(stored, factors)
    how = FineTuning(rank=2, prior=stored.dtype)
    assert sizes(model, how)["projecting"] == largest.nbytes < delta.float().nbytes


def test_deltas_on_the_host(folder: Path) -> None:
    model, _ = meta_model(folder)
    there, here = (FineTuning(prior=torch.int8, prior_on_host=on_host) for on_host in (True, False))
    (prior,) = [item for item in table(model, there) if item.on_host]
    assert prior.what == "prior"
    assert prior.nbytes == sizes(model, here)["prior"]
    codes = 72 * 40 + -(-72 * 40 // 128) * 4
    assert sizes(model, there)["projecting"] - sizes(model, here)["projecting"] == codes


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    options = ["--rank", "8", "--base-bits", "4", "--prior-rank", "4", "--prior-device", "cpu"]
    assert main(["memory", "--model", str(tmp_path), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    how = FineTuning(rank=8, base_bits=4, prior_rank=4, prior_on_host=True)
    assert found["items"] == [item._asdict() for item in table(meta_model(folder)[0], how)]
    assert found["host"] == sum(item["nbytes"] for item in found["items"] if item["on_host"]) > 0
    assert found["device"] + found["host"] == sum(item["nbytes"] for item in found["items"])

    assert main(["memory", "--model", str(tmp_path / "config.json"), *options]) == 0
    printed = capsys.readouterr().out
    assert "Qwen2ForCausalLM" in printed
    for item in found["items"]:
        assert item["what"] in printed
    assert "activations" in printed
    assert "…" not in printed, "the table fits 80 columns"


@transformers_5
def test_what_has_no_adapters_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = hf.Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(tmp_path)
    names = without_adapters(meta_model(tmp_path)[0], ["attn", "mlp"])
    assert names[:2] == [f"model.layers.0.mlp.experts.{part}" for part in ("down_proj", "gate_up_proj")]
    assert len(names) == 2 * TEXT["num_hidden_layers"]
    assert main(["memory", "--model", str(tmp_path)]) == 0
    assert (
        f"No adapters on {len(names)} parameters that are not in Linear layers: {names[0]}" in capsys.readouterr().out
    )


def test_a_hub_id_may_have_a_revision(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def meta_model(source: str, revision: str | None) -> None:
        asked.append((source, revision))
        raise UnknownModelError("seen")

    monkeypatch.setattr(sizing, "meta_model", meta_model)
    for model in ("org/name@v1.0", "org/name"):
        assert main(["memory", "--model", model]) == 1
        assert f"{model}: seen" in capsys.readouterr().err
    assert asked == [("org/name", "v1.0"), ("org/name", None)]


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (None, [], "config.json has no architecture"),
        ({"architectures": ["NovelForCausalLM"]}, [], "has no NovelForCausalLM"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES},
            ["--modules", "re:x"],
            "has no Linear in re:x",
        ),
    ],
)
def test_a_model_that_is_none(
    config: dict[str, Any] | None, options: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["memory", "--model", str(tmp_path), *options]) == 1
    assert reason in capsys.readouterr().err.replace("\n", " ")
