"""Parameter lists of real models, in their own order, scaled down to fit a machine.

The sizes are from the published configurations; the names are those of transformers 4.52 and later.
`tests/test_benchmarks.py` compares the lists with transformers' own models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

NamedShape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Text:
    """A Qwen2.5 language model. `kv` is the width of the key and value projections."""

    hidden: int
    intermediate: int
    kv: int
    layers: int
    vocabulary: int
    tied: bool


@dataclass(frozen=True)
class Vision:
    """The vision tower of Qwen2.5-VL: patches of 3 channels, 2 frames, 14 x 14 pixels, merged 2 x 2."""

    hidden: int
    intermediate: int
    layers: int


@dataclass(frozen=True)
class Model:
    text: Text
    vision: Vision | None = None


VISION = Vision(hidden=1280, intermediate=3420, layers=32)
MODELS = {
    "qwen2.5-vl-7b": Model(Text(3584, 18944, 512, layers=28, vocabulary=152064, tied=False), VISION),
    "qwen2.5-vl-3b": Model(Text(2048, 11008, 256, layers=36, vocabulary=151936, tied=True), VISION),
    "qwen2.5-0.5b": Model(Text(896, 4864, 128, layers=24, vocabulary=151936, tied=True)),
}

# As many tensors as qwen2.5-vl-7b, each almost empty: what remains of a step is its cost per tensor.
TINY = "tiny"
TINY_TENSORS, TINY_NUMEL = 729, 8

NAMES = (*MODELS, TINY)

# What a prior can cover: modules of the language model, or every tensor.
MODULES = {
    "attn": re.compile(r"\blayers\.\d+\.self_attn\.[qkvo]_proj\."),
    "mlp": re.compile(r"\blayers\.\d+\.mlp\.(gate|up|down)_proj\."),
    "all": re.compile(""),
}


def covered(name: str, modules: list[str]) -> bool:
    """Whether a prior of these modules (keys of MODULES) has a delta for the parameter."""
    return any(MODULES[module].search(name) for module in modules)


def numel(shapes: list[NamedShape]) -> int:
    return sum(math.prod(shape) for _, shape in shapes)


def named_shapes(model: str, scale: float = 1.0, layers: int | None = None) -> list[NamedShape]:
    """The names and shapes of a model's parameters, with every width and the vocabulary divided by `scale`.

    The number of tensors and their proportions are kept, except that widths are rounded to multiples of 4. With
    `layers`, only that many first layers of the text model and of the vision tower are kept.
    """
    if model == TINY:
        return [(f"model.layers.{i}.self_attn.q_proj.weight", (TINY_NUMEL,)) for i in range(TINY_TENSORS)]
    config = MODELS[model]
    return list(_parameters(config if layers is None else _first_layers(config, layers), scale))


def fit(model: str, target: int) -> float:
    """The scale at which a model has about `target` parameters; 1 if it does not have more than that."""
    if numel(named_shapes(model)) <= target:
        return 1.0
    low, high = 1.0, 2.0
    while numel(named_shapes(model, high)) > target:
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError(f"{model} has at least {numel(named_shapes(model, high)):,} parameters, got {target:,}")
    for _ in range(30):
        middle = (low + high) / 2
        if numel(named_shapes(model, middle)) > target:
            low = middle
        else:
            high = middle
    return high


def _first_layers(config: Model, layers: int) -> Model:
    vision = config.vision
    return Model(
        text=replace(config.text, layers=min(layers, config.text.layers)),
        vision=None if vision is None else replace(vision, layers=min(layers, vision.layers)),
    )


def _parameters(config: Model, scale: float) -> Iterator[NamedShape]:
    def scaled(width: int) -> int:
        return max(4, 4 * round(width / scale / 4))

    text = config.text
    hidden, intermediate, kv = scaled(text.hidden), scaled(text.intermediate), scaled(text.kv)
    vocabulary = scaled(text.vocabulary)
    if config.vision is not None:
        vision_widths = scaled(config.vision.hidden), scaled(config.vision.intermediate)
        yield from _vision_tower("model.visual", *vision_widths, config.vision.layers, out=hidden)
    prefix = "model" if config.vision is None else "model.language_model"
    yield f"{prefix}.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(text.layers):
        yield from _text_layer(f"{prefix}.layers.{layer}", hidden, intermediate, kv)
    yield f"{prefix}.norm.weight", (hidden,)
    if not text.tied:
        yield "lm_head.weight", (vocabulary, hidden)


def _text_layer(prefix: str, hidden: int, intermediate: int, kv: int) -> Iterator[NamedShape]:
    for projection, width in (("q", hidden), ("k", kv), ("v", kv)):
        yield f"{prefix}.self_attn.{projection}_proj.weight", (width, hidden)
        yield f"{prefix}.self_attn.{projection}_proj.bias", (width,)
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
    yield f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden)
    yield f"{prefix}.mlp.up_proj.weight", (intermediate, hidden)
    yield f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)


def _vision_tower(prefix: str, hidden: int, intermediate: int, layers: int, out: int) -> Iterator[NamedShape]:
    def linear(name: str, rows: int, columns: int) -> Iterator[NamedShape]:
        yield f"{name}.weight", (rows, columns)
        yield f"{name}.bias", (rows,)

    yield f"{prefix}.patch_embed.proj.weight", (hidden, 3, 2, 14, 14)
    for layer in range(layers):
        block = f"{prefix}.blocks.{layer}"
        yield f"{block}.norm1.weight", (hidden,)
        yield f"{block}.norm2.weight", (hidden,)
        yield from linear(f"{block}.attn.qkv", 3 * hidden, hidden)
        yield from linear(f"{block}.attn.proj", hidden, hidden)
        yield from linear(f"{block}.mlp.gate_proj", intermediate, hidden)
        yield from linear(f"{block}.mlp.up_proj", intermediate, hidden)
        yield from linear(f"{block}.mlp.down_proj", hidden, intermediate)
    yield f"{prefix}.merger.ln_q.weight", (hidden,)
    yield from linear(f"{prefix}.merger.mlp.0", 4 * hidden, 4 * hidden)
    yield from linear(f"{prefix}.merger.mlp.2", out, 4 * hidden)
