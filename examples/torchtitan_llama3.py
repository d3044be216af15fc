"""torchtitan: a Llama from an HF checkpoint, fine-tuned by torchtitan's `train.py`, and saved as an HF checkpoint.

`plain` and `with_prior` are functions of a config registry: `torchrun -m torchtitan.train --module
examples.torchtitan_llama3 --config with_prior` trains on GPUs. All paths are relative to the working directory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

# isort: off
from . import tiny, torchtitan_cpu as torchtitan_cpu  # before the rest of torchtitan

# isort: on
import torch
import torchtitan.train
from safetensors.torch import load_file
from torch import nn
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config.configs import TrainingConfig
from torchtitan.hf_datasets.text_datasets import ChatDataLoader
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import get_attention_config, make_ffn_config, make_gqa_config
from torchtitan.models.llama3 import Llama3Model, model_registry
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer
from transformers import LlamaConfig, LlamaForCausalLM

from drift_kernels.integrations.torchtitan import use_drift

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, EPS = 48, 96, 2, 4, 2, 1e-5
TOKENS = 6  # per text, minus one


def new_llama() -> LlamaForCausalLM:
    """A new HF model of the same architecture."""
    config = LlamaConfig(
        vocab_size=len(tiny.WORDS),
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=EPS,
        initializer_range=0.2,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=tiny.WORDS.index(tiny.EOS),
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def model_spec(fuse_qkv: bool = True) -> ModelSpec:
    """A tiny version of torchtitan's llama3."""
    spec = model_registry("debugmodel")
    rope = ComplexRoPE.Config(dim=WIDTH // HEADS, max_seq_len=64, theta=10000.0)
    init = {"weight": nn.init.zeros_}  # the HF checkpoint is loaded anyway

    def norm() -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=WIDTH, eps=EPS, param_init=init)

    spec.model = Llama3Model.Config(
        dim=WIDTH,
        vocab_size=len(tiny.WORDS),
        tok_embeddings=Embedding.Config(num_embeddings=len(tiny.WORDS), embedding_dim=WIDTH, param_init=init),
        norm=norm(),
        lm_head=Linear.Config(in_features=WIDTH, out_features=len(tiny.WORDS), param_init=init),
        layers=[
            Llama3TransformerBlock.Config(
                attention_norm=norm(),
                ffn_norm=norm(),
                attention=make_gqa_config(
                    dim=WIDTH,
                    n_heads=HEADS,
                    n_kv_heads=KV_HEADS,
                    wqkv_param_init=init,
                    wo_param_init=init,
                    inner_attention=get_attention_config("flex"),
                    fuse_qkv=fuse_qkv,
                    rope=rope,
                ),
                feed_forward=make_ffn_config(dim=WIDTH, hidden_dim=HIDDEN, w1_param_init=init, w2w3_param_init=init),
            )
            for _ in range(LAYERS)
        ],
    )
    return spec


def messages(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def plain() -> Trainer.Config:
    return Trainer.Config(
        model_spec=model_spec(),
        hf_assets_path=str(Path("base").resolve()),
        loss=CrossEntropyLoss.Config(global_vocab_size=len(tiny.WORDS)),
        optimizer=default_adamw(lr=tiny.LR, betas=(0.9, 0.999), weight_decay=0.01),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_type="cosine"),
        training=TrainingConfig(
            local_batch_size=tiny.BATCH_SIZE // 4,
            seq_len=4 * TOKENS,  # texts are packed
            steps=tiny.STEPS,
            mixed_precision_param="float32",
        ),
        dataloader=ChatDataLoader.Config(
            dataset_path="json",
            load_dataset_kwargs={"data_files": "sums.jsonl", "split": "train"},
            sample_processor=messages,
        ),
        checkpoint=CheckpointManager.Config(
            enable=True,
            interval=tiny.STEPS // 2,
            initial_load_path=str(Path("base").resolve()),
            initial_load_in_hf=True,
            last_save_in_hf=True,
        ),
        metrics=MetricsProcessor.Config(log_freq=30),
        activation_checkpoint=None,
    )


def with_prior() -> Trainer.Config:
    return use_drift(plain(), prior="prior", alpha=tiny.ALPHA, anneal=1.0)


def write_files() -> None:
    """Write the checkpoints, the prior and the texts to the working directory."""
    tiny.write_files(Path(), new_llama)
    Path("base", "chat_template.jinja").write_text("{{ messages | map(attribute='content') | join }}")
    with Path("sums.jsonl").open("w") as file:
        for pair in tiny.training_pairs(tiny.STEPS * tiny.BATCH_SIZE):
            file.write(json.dumps(dict(zip(("prompt", "completion"), tiny.text(pair), strict=True))) + "\n")


def train(config: str, folder: str, *arguments: str) -> None:
    """Run `python -m torchtitan.train --module examples.torchtitan_llama3 --config CONFIG ...` in this process
    alone."""
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = ["--module", "examples.torchtitan_llama3", "--config", config, "--dump_folder", folder]
    with patch.dict(os.environ, one), patch.object(sys, "argv", ["train.py", *command, *arguments]):
        torchtitan.train.main()


def trained(folder: str) -> LlamaForCausalLM:
    """The last checkpoint of a run, in HF's format, loaded by transformers."""
    last = max(Path(folder, "checkpoint").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    model = new_llama()
    model.load_state_dict(
        {name: tensor for file in last.glob("*.safetensors") for name, tensor in load_file(file).items()}
    )
    return model


def fine_tuned(config: str, folder: str, *arguments: str) -> LlamaForCausalLM:
    train(config, folder, *arguments)
    return trained(folder)


def stopped_and_resumed(config: str, folder: str, steps: int) -> LlamaForCausalLM:
    whole = ("--lr_scheduler.total_steps", str(steps))
    to_resume = ("--checkpoint.no-last-save-in-hf", "--checkpoint.no-last-save-model-only")
    train(config, folder, *whole, "--training.steps", str(steps // 2), *to_resume)
    return fine_tuned(config, folder, *whole, "--training.steps", str(steps))


if __name__ == "__main__":
    tiny.quiet()
    logging.disable(logging.WARNING)
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_files()
        print(f"held-out loss before fine-tuning       {tiny.held_out_loss(tiny.base_and_expert(new_llama)[0]):.3f}")
        print(f"              after, without a prior   {tiny.held_out_loss(fine_tuned('plain', 'plain')):.3f}")
        whole = fine_tuned("with_prior", "whole")
        print(f"              after, with the prior    {tiny.held_out_loss(whole):.3f}")
        resumed = stopped_and_resumed("with_prior", "stopped", tiny.STEPS)
        print(f"Stopped at step {tiny.STEPS // 2} and resumed, bitwise identical: {tiny.same(whole, resumed)}")
