"""The language model of every family: a few hundred thousand parameters."""

from __future__ import annotations

from .data import EOS, PAD, TOKEN_ID, TOKENS

HIDDEN, HEADS = 96, 4
ROPE_THETA = 10_000.0

LANGUAGE = {
    "vocab_size": len(TOKENS),
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,  # the classes have different defaults
    "rope_theta": ROPE_THETA,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": TOKEN_ID[EOS],
    "pad_token_id": TOKEN_ID[PAD],
}
