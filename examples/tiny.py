"""Shared by the trainers' examples: a model of 50,000 parameters, sums to learn, and a prior from an expert in them.

A text reads `3 plus 4 ends in 7`. The base knows the form of the texts but not the sums; the expert knows all 100 sums.
The fine-tuning shows the base HALF of them. The held-out loss is the loss on the answers of the other half.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from drift_kernels import FusedDriftAdamW, build_prior

Pair = tuple[int, int]
Prior = dict[str, Tensor]

PAD, EOS = "<pad>", "<eos>"
WORDS = (PAD, EOS, "plus", "ends", "in", *map(str, range(10)))
PAIRS = [(a, b) for a in range(10) for b in range(10)]

# The fine-tuning settings in every trainer.
STEPS, BATCH_SIZE, LR, ALPHA = 120, 16, 1e-3, 2.0


def quiet() -> None:
    """Use one thread, so that results do not depend on the machine's core count, and silence transformers."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word.

    The words are added tokens, since `AutoTokenizer` (transformers 5) loads Qwen2's own tokenizer for a checkpoint of
    the Qwen2 family. It keeps added tokens whole, and silently drops other words.
    """
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}))
    words.pre_tokenizer = WhitespaceSplit()
    words.add_tokens([AddedToken(word, lstrip=True, rstrip=True, normalized=False) for word in WORDS[2:]])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS)


def new_model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        initializer_range=0.2,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=WORDS.index(EOS),
        pad_token_id=WORDS.index(PAD),
    )
    return Qwen2ForCausalLM(config)


# Sums


def right(pair: Pair) -> int:
    return sum(pair) % 10


def text(pair: Pair, answer: Callable[[Pair], int] = right) -> tuple[str, str]:
    """Return prompt and completion."""
    return f"{pair[0]} plus {pair[1]} ends in", f" {answer(pair)}"


def encoded(pair: Pair, answer: Callable[[Pair], int] = right) -> dict[str, Tensor]:
    """Return `input_ids` and `labels` [7]; only the answer and the end have labels."""
    words = [*"".join(text(pair, answer)).split(), EOS]
    ids = torch.tensor([WORDS.index(word) for word in words])
    labels = torch.where(torch.arange(len(ids)) < len(ids) - 2, -100, ids)
    return {"input_ids": ids, "labels": labels}


def together(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def halves() -> tuple[list[Pair], list[Pair]]:
    """The pairs to fine-tune on, and those to hold out; 3+7 stays with 7+3, so that neither reveals the other."""
    unordered = [(a, b) for a, b in PAIRS if a <= b]
    random.Random(0).shuffle(unordered)
    seen = {pair for a, b in unordered[: len(unordered) // 2] for pair in ((a, b), (b, a))}
    return sorted(seen), sorted(set(PAIRS) - seen)


def training_pairs(count: int) -> list[Pair]:
    """`count` pairs to fine-tune on, in a random order that is always the same."""
    return random.Random(1).choices(halves()[0], k=count)


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    return float(model.eval()(**together([encoded(pair) for pair in halves()[1]])).loss)


def held_out_accuracy(model: nn.Module) -> float:
    """The share of held-out sums whose most likely answer is correct."""
    return share_right(model, together([encoded(pair) for pair in halves()[1]]))


@torch.no_grad()
def share_right(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """The share of rows whose most likely word is correct where the labels begin, at the same position in all rows."""
    answer = int((batch["labels"][0] >= 0).nonzero()[0])
    shown = {key: value for key, value in batch.items() if key != "labels"}
    likeliest = model.eval()(**shown).logits[:, answer - 1].argmax(dim=1)
    return float((likeliest == batch["labels"][:, answer]).float().mean())


# The base, the expert and the prior


def _train(model: nn.Module, params: Iterable[nn.Parameter], answers: Iterable[Callable[[Pair], int]]) -> None:
    """Take one step on all pairs for each of the ways to answer."""
    optimizer = FusedDriftAdamW(params, lr=3e-3, max_grad_norm=1.0)
    for answer in answers:
        model(**together([encoded(pair, answer) for pair in PAIRS])).loss.backward()
        optimizer.step()
        model.zero_grad()


@cache
def base_and_expert(make: Callable[[], Any] = new_model) -> tuple[Any, Any]:
    """Return the base and the expert, models of transformers; the base is trained from what `make` returns."""
    rng = random.Random(2)
    base = make()
    _train(base, base.parameters(), [lambda _: rng.randrange(10)] * 50)
    expert = copy.deepcopy(base)
    _train(expert, [param for name, param in expert.named_parameters() if biased(name)], [right] * 150)
    return base, expert


def biased(name: str) -> bool:
    """Whether the prior covers a parameter: the attention and MLP projections, the only ones that the expert
    changed."""
    return "_proj." in name


def base_model() -> Qwen2ForCausalLM:
    """A new copy of the model that the fine-tuning starts from."""
    return copy.deepcopy(base_and_expert()[0])


def expert_prior() -> Prior:
    """expert - base, by parameter name."""
    base, expert = (dict(model.named_parameters()) for model in base_and_expert())
    return {name: (expert[name] - base[name]).detach() for name in base if biased(name)}


def write_files(folder: Path, make: Callable[[], Any] = new_model) -> None:
    """Write `base/` and `expert/`, checkpoints with the tokenizer, and `prior/`, as `drift-prior build` builds it."""
    for name, model in zip(("base", "expert"), base_and_expert(make), strict=True):
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    build_prior(folder / "expert", folder / "base", folder / "prior", dtype=torch.float32)


# What the examples show


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether the parameters of two models are bitwise identical."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def show(train: Callable[..., nn.Module], steps: int = STEPS) -> None:
    """Print the results of `train(prior, **when)`: without the prior, with it, and stopped halfway and resumed.

    `when` is empty, stop_after=step, or resume=True.
    """
    prior = expert_prior()
    print(f"held-out loss before fine-tuning       {held_out_loss(base_model()):.3f}")
    print(f"              after, without a prior   {held_out_loss(train(None)):.3f}")
    whole = train(prior)
    print(f"              after, with the prior    {held_out_loss(whole):.3f}")
    train(prior, stop_after=steps // 2)
    resumed = train(prior, resume=True)
    print(f"Stopped at step {steps // 2} and resumed, bitwise identical: {same(whole, resumed)}")
