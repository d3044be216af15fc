"""Fine-tunes a small Qwen2 on text that comes with Python, once per precision mode, from the same start.

Every mode computes in float32 from its stored weights: only the weights, their gradients (in the weights' dtype), the
states and the rounding differ.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.optim import Optimizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from drift_kernels import FusedDriftAdamW

Params = dict[str, Tensor]
Record = dict[str, Any]

ALPHABET = 128  # ASCII; other characters become "?"


@dataclass(frozen=True)
class Mode:
    """A way to store weights and states: `options` for FusedDriftAdamW, or torch's AdamW."""

    weights: str
    states: str
    param_dtype: torch.dtype
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: bool = True

    @property
    def name(self) -> str:
        return f"{self.weights}, {self.states} states"

    def optimizer(self, params: list[Tensor], lr: float, seed: int) -> Optimizer:
        if not self.ours:
            return torch.optim.AdamW(params, lr=lr, fused=True)
        return FusedDriftAdamW(params, lr=lr, seed=seed, **self.options)

    def refusal(self) -> str | None:
        """Why this version of the optimizer does not support the mode; None if it does."""
        try:
            self.optimizer([torch.zeros(8, dtype=self.param_dtype, requires_grad=True)], lr=1e-3, seed=0)
        except (TypeError, ValueError) as error:
            return str(error)
        return None


BF16 = torch.bfloat16
STOCHASTIC, MASTER = {"rounding": "stochastic"}, {"master_weights": True}
MODES = (
    Mode("float32", "float32", torch.float32),
    Mode("bf16 nearest", "float32", BF16),
    Mode("bf16 nearest", "bf16 nearest", BF16, {"state_dtype": BF16}),
    Mode("bf16 stochastic", "float32", BF16, STOCHASTIC),
    Mode("bf16 stochastic", "bf16 stochastic", BF16, {**STOCHASTIC, "state_dtype": BF16}),
    Mode("bf16 stochastic", "int8", BF16, {**STOCHASTIC, "state_dtype": torch.int8}),
    Mode("bf16 + master", "float32", BF16, MASTER),
    Mode("bf16 + master", "bf16 nearest", BF16, {**MASTER, "state_dtype": BF16}),
    Mode("bf16 + master", "bf16 stochastic", BF16, {**MASTER, **STOCHASTIC, "state_dtype": BF16}),
    Mode("bf16 + master", "int8", BF16, {**MASTER, "state_dtype": torch.int8}),
    Mode("bf16 nearest (torch)", "bf16 nearest", BF16, ours=False),
)


@dataclass(frozen=True)
class Settings:
    """Settings shared by all modes and seeds. They were chosen on other seeds than the reported ones."""

    lr: float = 1e-5
    steps: int = 300
    pretraining_lr: float = 2e-3
    pretraining_steps: int = 600
    warmup_steps: int = 20
    evaluate_every: int = 50
    batch_size: int = 8
    length: int = 128  # bytes per example
    hidden: int = 128
    layers: int = 3

    def total_steps(self, modes: int) -> int:
        return self.pretraining_steps + modes * self.steps

    def lrs(self) -> list[float]:
        return [self.lr * self._warmup(step) for step in range(self.steps)]

    def pretraining_lrs(self) -> list[float]:
        """The learning rates: a warm-up, then a half cosine down to zero."""
        count = self.pretraining_steps
        cosine = [0.5 + 0.5 * math.cos(math.pi * step / count) for step in range(count)]
        return [self.pretraining_lr * self._warmup(step) * cosine[step] for step in range(count)]

    def _warmup(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup_steps)


@cache
def texts() -> tuple[str, str]:
    """Return prose for pretraining (the Python manual's help topics) and code for fine-tuning (asyncio's source)."""
    sources = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    return "\n".join(topics[key] for key in sorted(topics)), "\n".join(path.read_text("utf-8") for path in sources)


def text_digest() -> str:
    """A digest of the texts, which differ between Python versions."""
    return hashlib.sha256("\0".join(texts()).encode()).hexdigest()[:16]


def examples(text: str, length: int) -> Tensor:
    """Cut the text's bytes into int64 [examples, length]."""
    codes = torch.tensor(list(text.encode("ascii", "replace")))
    return codes[: len(codes) // length * length].view(-1, length)


def batches(data: Tensor, steps: int, batch_size: int, seed: int) -> Tensor:
    """Return int64 [steps, batch_size, length]: every example once, in a seeded random order, then all over again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch_size / len(data))
    order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(epochs)])
    return data[order[: steps * batch_size]].view(steps, batch_size, -1)


def new_model(settings: Settings, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=ALPHABET,
        hidden_size=settings.hidden,
        intermediate_size=2 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=settings.length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def loss_of(model: Qwen2ForCausalLM, params: Params, batch: Tensor) -> Tensor:
    """The mean cross-entropy of the next byte, in nats, computed in float32 from params of any dtype."""
    float_params = {name: param.float() for name, param in params.items()}
    logits = functional_call(model, float_params, (), {"input_ids": batch, "use_cache": False}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: Qwen2ForCausalLM, params: Params, data: Tensor, batch_size: int = 32) -> float:
    parts = data.split(batch_size)
    return sum(loss_of(model, params, part).item() * len(part) for part in parts) / len(data)


def train(
    model: Qwen2ForCausalLM, params: Params, optimizer: Optimizer, data: Tensor, lrs: list[float]
) -> Iterator[float]:
    """Train the params on one batch after another; yield the loss before each step."""
    for batch, lr in zip(data, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = loss_of(model, params, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def stored_bytes(params: Params, optimizer: Optimizer) -> int:
    """The bytes allocated for params and states after a step. Step counts may share memory."""
    tensors = [*params.values(), *(value for state in optimizer.state.values() for value in state.values())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


class SeedRun:
    """All modes of one seed.

    Args:
        seed: determines the initial weights, the order of the examples, and the stochastic rounding.
        after_step: called after every optimizer step with the name of the mode being trained.
    """

    def __init__(self, seed: int, settings: Settings, after_step: Callable[[str], object]) -> None:
        self.seed, self.settings, self.after_step = seed, settings, after_step
        prose, code = (examples(text, settings.length) for text in texts())
        held_out = torch.arange(len(code)) % 20 == 0
        self.held_out = code[held_out]
        self.batches = batches(code[~held_out], settings.steps, settings.batch_size, seed)
        self.model = new_model(settings, seed)
        self.start = self._pretrain(prose)

    def run(self, modes: tuple[Mode, ...]) -> Record:
        return {
            "seed": self.seed,
            "start_loss": self._held_out_loss(self.start),
            "modes": {mode.name: self.fine_tune(mode) for mode in modes},
        }

    def fine_tune(self, mode: Mode) -> Record:
        """Fine-tune from the start weights. Returns held-out losses as (step, loss), training losses averaged over ten
        steps, bytes and params."""
        params = {name: weight.to(mode.param_dtype, copy=True) for name, weight in self.start.items()}
        optimizer = mode.optimizer([param.requires_grad_() for param in params.values()], self.settings.lr, self.seed)
        losses, curve = [], []
        for loss in train(self.model, params, optimizer, self.batches, self.settings.lrs()):
            losses.append(loss)
            if len(losses) % self.settings.evaluate_every == 0 or len(losses) == self.settings.steps:
                curve.append((len(losses), self._held_out_loss(params)))
            self.after_step(mode.name)
        return {
            "held_out": curve,
            "training": [mean(losses[i : i + 10]) for i in range(0, len(losses), 10)],
            "rounded_loss": self._held_out_loss({name: param.to(BF16) for name, param in params.items()}),
            "bytes": stored_bytes(params, optimizer),
            "params": sum(param.numel() for param in params.values()),
        }

    def _pretrain(self, prose: Tensor) -> Params:
        """Train on the prose; return the weights, rounded to bfloat16 once."""
        settings = self.settings
        params = dict(self.model.named_parameters())
        optimizer = FusedDriftAdamW(params.values(), lr=settings.pretraining_lr, max_grad_norm=1.0)
        data = batches(prose, settings.pretraining_steps, settings.batch_size, self.seed)
        for _ in train(self.model, params, optimizer, data, settings.pretraining_lrs()):
            self.after_step("pretraining")
        return {name: param.detach().to(BF16) for name, param in params.items()}

    def _held_out_loss(self, params: Params) -> float:
        return mean_loss(self.model, params, self.held_out)
