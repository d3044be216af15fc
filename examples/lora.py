"""What the examples with LoRA adapters share: where A begins."""

from __future__ import annotations

import torch

from drift_kernels.adapters import AdapterPrior


@torch.no_grad()
def begin_along(prior: AdapterPrior) -> None:
    """Sets each adapter's A to the top right singular vectors of its weight's delta: what of the delta a matrix of its
    rank can see most of. B stays zero, and so the model as it is."""
    weights = {adapter.weight: torch.empty(adapter.shape, device="meta") for adapter in prior.adapters}
    names = prior.prior.coverage(weights.items()).matched
    for adapter in prior.adapters:
        if adapter.weight in names:
            a, _ = adapter.params()
            _, _, directions = torch.linalg.svd(prior.prior.load(names[adapter.weight]).float(), full_matrices=False)
            a.copy_(directions[: len(a)])
