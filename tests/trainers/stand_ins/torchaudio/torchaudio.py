"""Replaces torchaudio, which LLaMA-Factory imports at startup but uses only for sound."""
