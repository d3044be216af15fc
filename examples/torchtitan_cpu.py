"""torchtitan on a CPU, which it does not support. Import this module before the rest of torchtitan: without an
accelerator, it fills in what is missing. `python -m examples.torchtitan_cpu` then acts as `python -m torchtitan.train`.

- The device and its memory figures, which torchtitan requests from CUDA.
- FlexAttention's backward pass: `scaled_dot_product_attention` with the same masks instead.
- Reductions that scale their sum, which gloo does not support: FSDP2 scales afterwards.
- `torch.distributed.set_timeout`, new in torch 2.14. FSDP2 also supports torchtitan's default, `spmd_types`, only from
  that version on: before it, several processes need `--parallelism.spmd_backend partial_dtensor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.tools.utils as titan
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.nn.functional import scaled_dot_product_attention

CPU = SimpleNamespace(
    set_device=lambda device: None,
    current_device=lambda: 0,
    device_count=lambda: 1,
    synchronize=lambda: None,
    get_device_name=lambda device: "CPU",
    get_device_properties=lambda device: SimpleNamespace(total_memory=1 << 34),
    memory_stats=lambda device: {},
    reset_peak_memory_stats=lambda: None,
    empty_cache=lambda: None,
)


def fill_in() -> None:
    if torch.accelerator.is_available() or titan.device_type == "cpu":
        return
    titan.device_type, titan.device_module = "cpu", CPU
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = lambda timeout, group=None: None  # type: ignore[attr-defined]

    from torchtitan.config import ConfigManager
    from torchtitan.models.common.attention import FlexAttention

    FlexAttention.forward = _attention  # type: ignore[method-assign]
    parse = ConfigManager.parse_args
    ConfigManager.parse_args = lambda self, args=None: _for_cpu(parse(self, args))  # type: ignore[method-assign]


def _attention(
    self: nn.Module,
    q_BLNH: Tensor,  # noqa: N803 (torchtitan looks for these names)
    k_BLNH: Tensor,  # noqa: N803
    v_BLNH: Tensor,  # noqa: N803
    *,
    attention_masks: BlockMask,
    scale: float | None = None,
    enable_gqa: bool = False,
    **_: Any,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
    mask = create_mask(attention_masks.mask_mod, len(q), 1, q.shape[2], k.shape[2], "cpu")
    return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa).transpose(1, 2)


def _for_cpu(config: Any) -> Any:
    config.training.disable_cuda_graphs = True
    spec = config.model_spec
    config.model_spec = replace(spec, parallelize_fn=_with_plain_sums(spec.parallelize_fn))
    return config


def _with_plain_sums(parallelize: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def parallelized(model: nn.Module, **options: Any) -> nn.Module:
        model = parallelize(model, **options)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model

    return parallelized


fill_in()

if __name__ == "__main__":
    from torchtitan.train import main

    torch.set_num_threads(1)
    main()
