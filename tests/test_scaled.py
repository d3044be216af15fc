"""FP8 checkpoints: codes and scales are converted to weights while they are read, whatever the scales apply to."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from checkpoints import text_weights, tuned, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from drift_kernels import CheckpointError, Prior, PriorError, apply_prior, build_prior
from drift_kernels.prior import arithmetic, norms, stream
from drift_kernels.prior.checkpoint import Checkpoint
from drift_kernels.prior.unfusing import unfuse

CODES = torch.float8_e4m3fn
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 8]}}


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def encode(shape: tuple[int, ...], scales_shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random codes without NaN, and scales that are not powers of two."""
    codes = torch.randn(shape).mul(100).clamp(-448, 448).to(CODES)
    return codes, torch.rand(scales_shape).mul(0.01).add(1e-3).to(dtype)


def expected(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The weights, computed element by element."""
    *_, rows, columns = codes.shape
    grid = scales.float().view(*codes.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    by_row = grid.repeat_interleave(block[0], -2)[..., :rows, :]
    return codes.float() * by_row.repeat_interleave(block[1], -1)[..., :columns]


def in_fp8(weights: dict[str, Tensor], block: tuple[int, int], suffix: str = "_scale_inv") -> dict[str, Tensor]:
    """Every projection as codes, with scales per block."""
    stored = dict(weights)
    for name, weight in weights.items():
        if name.endswith("_proj.weight"):
            stored[name], stored[name + suffix] = encode(weight.shape, grid(weight.shape, block), torch.float32)
    return stored


def dequantised(stored: dict[str, Tensor], block: tuple[int, int], suffix: str = "_scale_inv") -> dict[str, Tensor]:
    return {
        name: expected(tensor, stored[name + suffix], block) if tensor.dtype == CODES else tensor
        for name, tensor in stored.items()
        if not name.endswith(suffix)
    }


FORMS = {
    "blocks": ((33, 31), (16, 8), "_scale_inv", (3, 4), torch.float32),
    "blocks that fit": ((32, 24), (16, 8), "_scale_inv", (2, 3), torch.float32),
    "blocks larger than the matrix": ((7, 5), (16, 8), "_scale_inv", (1, 1), torch.float32),
    "scales in bfloat16": ((33, 31), (16, 8), "_scale_inv", (3, 4), torch.bfloat16),
    "fused experts": ((3, 17, 9), (16, 8), "_scale_inv", (3, 2, 2), torch.float32),
    "rows": ((33, 31), (1, 31), "_scale", (33, 1), torch.bfloat16),
    "rows, a vector": ((33, 31), (1, 31), "_scale", (33,), torch.float32),
    "the whole": ((33, 31), (33, 31), "_scale", (1,), torch.float32),
    "the whole, a scalar": ((33, 31), (33, 31), "_scale", (), torch.float32),
    "the whole stack": ((3, 17, 9), (51, 9), "_scale", (1,), torch.float32),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_run_of_elements_is_code_times_scale(form: str, tmp_path: Path) -> None:
    shape, block, suffix, scales_shape, dtype = FORMS[form]
    codes, scales = encode(shape, scales_shape, dtype)
    write_checkpoint(tmp_path / "x", {"w": codes, f"w{suffix}": scales}, config=BLOCKS)
    if form == "the whole stack":
        want = (codes.float() * scales.float()).view(-1)
    else:
        want = expected(codes, scales, block).view(-1)
    with Checkpoint(tmp_path / "x") as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
        tensor = checkpoint.tensors["w"]
        assert tensor.dtype == torch.float32
        assert torch.equal(checkpoint.read(tensor), want.view(shape))
        ends = range(1, want.numel() + 1, 7)
        for begin in range(0, want.numel(), 5):
            for end in filter(lambda end: begin < end < begin + 90, ends):
                flat = torch.full((end - begin,), torch.nan)
                checkpoint.read_into(flat, tensor, begin)
                assert torch.equal(flat, want[begin:end]), (begin, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    fp8 = importlib.import_module("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8, "Fp8Dequantize"):
        pytest.skip("this transformers does not dequantise on the CPU")
    codes, scales = encode((256, 384), (2, 3), dtype)
    write_checkpoint(tmp_path / "x", {"w.weight": codes, "w.weight_scale_inv": scales})  # 128 by 128 is the default
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=torch.float32)
    with Checkpoint(tmp_path / "x") as checkpoint:
        assert torch.equal(checkpoint.read(checkpoint.tensors["w.weight"]), theirs)


@pytest.mark.parametrize("role", ["expert", "base", "reference"])
@pytest.mark.parametrize("chunk", [128, norms.CHUNK])
def test_a_prior_of_fp8(role: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bfloat16 weights: the delta is the float32 difference of the stored values."""
    monkeypatch.setattr(stream, "CHUNK", chunk)
    plain = {name: weight.bfloat16() for name, weight in text_weights().items()}
    roles = {"expert": tuned(plain), "base": plain, "reference": tuned(plain)}
    stored = in_fp8(roles[role], (16, 8))
    roles[role] = dequantised(stored, (16, 8))
    for name, weights in roles.items():
        write_checkpoint(tmp_path / name, stored if name == role else weights, shards=3, config=BLOCKS)
    reference = tmp_path / "reference" if role == "reference" else None
    options = {"dtype": torch.float32, "reference": reference}
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", **options)
    origin = roles["base" if reference is None else "reference"]
    assert len(prior) == 24
    for name in prior.names:
        delta = roles["expert"][f"model.{name}"].float() - origin[f"model.{name}"].float()
        assert torch.equal(prior.load(name), delta), name
        assert prior.info(name).delta_norm == pytest.approx(delta.double().norm().item(), rel=1e-12)


@pytest.mark.parametrize("suffix", ["weight", "weight_scale_inv"])
def test_the_digest_is_of_codes_and_scales(suffix: str, tmp_path: Path) -> None:
    base = text_weights()
    stored = in_fp8(base, (16, 8))
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "expert", stored, config=BLOCKS)
    changed = {name: tensor.clone() for name, tensor in stored.items()}
    bits = changed[Q_PROJ.removesuffix("weight") + suffix].view(torch.uint8)
    # Of a code the sign, since the smallest bit makes 448 NaN. Of the first scale, which is little-endian, the smallest
    # bit: rounding hides it in less than half of the weights, and the scale has 128.
    place, bit = (bits.numel() - bits.shape[-1], 0x80) if suffix == "weight" else (0, 1)
    bits.view(-1)[place] ^= bit
    write_checkpoint(tmp_path / "changed", changed, config=BLOCKS)
    priors = [
        build_prior(tmp_path / expert, tmp_path / "base", tmp_path / f"prior-{expert}")
        for expert in ("expert", "changed")
    ]
    assert len({prior.record["sources"]["expert"]["sha256"] for prior in priors}) == 2
    assert len({prior.record["sources"]["base"]["sha256"] for prior in priors}) == 1
    assert priors[0].fingerprint != priors[1].fingerprint


@pytest.mark.parametrize("transposed", [True, False])
def test_single_experts_within_a_fused_stack_of_codes(transposed: bool, tmp_path: Path) -> None:
    hidden, inter, experts = 40, 24, 3
    shapes = {"gate_up_proj": (2 * inter, hidden), "down_proj": (hidden, inter)}
    config = {
        **BLOCKS,
        "model_type": "qwen3_vl_moe",
        "text_config": {"hidden_size": hidden, "moe_intermediate_size": inter},
    }
    stored, whole = {}, {}
    for leaf, shape in shapes.items():
        shape = (experts, *(shape[::-1] if transposed else shape))
        name = f"layers.0.mlp.experts.{leaf}"
        stored[name], stored[f"{name}_scale_inv"] = encode(shape, grid(shape, (16, 8)), torch.bfloat16)
        plain = expected(stored[name], stored[f"{name}_scale_inv"], (16, 8))
        whole[leaf] = plain.transpose(1, 2) if transposed else plain
    write_checkpoint(tmp_path / "x", stored, config=config)
    leaves = ("gate_proj", "up_proj", "down_proj")
    with Checkpoint(tmp_path / "x") as checkpoint:
        wanted = [f"layers.0.mlp.experts.0.{leaf}.weight" for leaf in leaves]
        found = unfuse(checkpoint, checkpoint.tensors, wanted)
        for expert in range(experts):
            gate, up, down = (checkpoint.read(found[f"layers.0.mlp.experts.{expert}.{leaf}.weight"]) for leaf in leaves)
            assert torch.equal(torch.cat([gate, up]), whole["gate_up_proj"][expert])
            assert torch.equal(down, whole["down_proj"][expert])


def damage(folder: Path, **tensors: Tensor | None) -> None:
    stored = load_file(folder / "model.safetensors")
    for part, tensor in tensors.items():
        name = Q_PROJ.removesuffix("weight") + part
        stored.pop(name, None)
        if tensor is not None:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight_scale_inv": None}, CheckpointError, rf"codes without scales: .*{Q_PROJ[6:]}"),
        ({"weight_scale_inv": torch.ones(4, 3)}, CheckpointError, rf"scales of {Q_PROJ} have shape \[4, 3\].*by 8"),
        ({"weight_scale_inv": torch.ones(3, 4).mul(torch.inf)}, CheckpointError, rf"damaged: .*{Q_PROJ} contain NaN"),
        ({"weight_scale_inv": torch.ones(3, 4).mul(torch.nan)}, CheckpointError, rf"damaged: .*{Q_PROJ} contain NaN"),
        ({"weight_scale_inv": torch.ones(3, 4, dtype=torch.uint8)}, CheckpointError, r"quantised \(fp8\)"),
        ({"weight_zero_point": torch.zeros(3, 4)}, CheckpointError, r"quantised \(fp8\)"),
        ({"weight": torch.full((33, 31), torch.nan).to(CODES)}, PriorError, rf"{Q_PROJ[6:]} contains NaN"),
    ],
)
def test_what_is_damaged_is_named(
    change: dict[str, Tensor | None], error: type[Exception], words: str, tmp_path: Path
) -> None:
    base = text_weights()
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "expert", in_fp8(base, (16, 8)), config=BLOCKS)
    damage(tmp_path / "expert", **change)
    with pytest.raises(error, match=words):
        build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    assert not list(tmp_path.glob("prior*"))


def test_compressed_tensors_in_blocks(tmp_path: Path) -> None:
    """The block size is elsewhere in its config."""
    group = {"weights": {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [16, 8]}}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}}
    base = text_weights()
    stored = in_fp8(base, (16, 8), "_scale")
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "expert", stored, config=config)
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior", dtype=torch.float32)
    want = dequantised(stored, (16, 8), "_scale")[Q_PROJ] - base[Q_PROJ]
    assert torch.equal(Prior.open(tmp_path / "prior").load(Q_PROJ.removeprefix("model.")), want)


@pytest.mark.parametrize("compiled", [True, False])
def test_weights_of_two_dtypes(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled pass handles them, widened."""
    if compiled and not arithmetic._compiled:
        pytest.skip("no compiled extension")
    monkeypatch.setattr(arithmetic, "_compiled", compiled)
    expert, base, other = torch.randn(1001), torch.randn(1001).bfloat16(), torch.randn(1001).half()
    for origin in (base, other):
        delta = torch.full((1001,), torch.nan)
        products = arithmetic.subtract(expert, base, origin, delta)
        assert torch.equal(delta, expert - origin.float())
        assert products.expert_base == pytest.approx(torch.dot(expert.double(), base.double()).item(), rel=1e-12)
        assert products.delta_delta == pytest.approx(delta.double().square().sum().item(), rel=1e-12)


def test_a_prior_is_not_applied_to_codes(tmp_path: Path) -> None:
    """They are read as weights, and cannot be written as such."""
    weights = text_weights()
    write_checkpoint(tmp_path / "expert", tuned(weights))
    write_checkpoint(tmp_path / "base", in_fp8(weights, (128, 128)))
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior")
    with pytest.raises(CheckpointError, match=r"the base is quantised: .* is stored as codes with scales"):
        apply_prior(prior, tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
