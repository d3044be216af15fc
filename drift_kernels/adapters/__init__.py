"""Priors for LoRA adapters: the interface of an adapter, and the projection of deltas onto its factors."""

from .adapter import Adapter, AdapterPrior
from .projection import Factors, made, merged, projected

__all__ = ["Adapter", "AdapterPrior", "Factors", "made", "merged", "projected"]
