"""Random bits for stochastic rounding, indexed by an element's position in the whole tensor. The specification of
csrc/philox.h."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Streams of random bits: each rounded tensor of a parameter has its own.
PARAM, EXP_AVG, EXP_AVG_SQ = range(3)

_MASK = 0xFFFFFFFF
_ROUNDS = 7


@dataclass(frozen=True)
class Place:
    """The position of a shard's elements in the whole tensor, which indexes their random bits.

    Runs of `width` elements begin `pitch` apart, the first at `origin`. If width is 0, there is one run of any length.
    """

    origin: int = 0
    width: int = 0
    pitch: int = 0

    def indices(self, numel: int, device: torch.device | str = "cpu") -> Tensor:
        """int64 [numel]: the index of each element in the whole tensor."""
        i = torch.arange(numel, dtype=torch.int64, device=device)
        return self.origin + i + (i // self.width * (self.pitch - self.width) if self.width else 0)


WHOLE = Place()


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), on 32-bit words in int64."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        a, b = x0 * 0xD2511F53, x2 * 0xCD9E8D57  # modulo 2^64
        x0, x1 = (b >> 32) & _MASK ^ x1 ^ key0, b & _MASK
        x2, x3 = (a >> 32) & _MASK ^ x3 ^ key1, a & _MASK
        key0, key1 = key0 + 0x9E3779B9 & _MASK, key1 + 0xBB67AE85 & _MASK
    return [x0, x1, x2, x3]


def random_bits(key: int, step: int | Tensor, stream: int, indices: Tensor) -> Tensor:
    """Return 16 random bits for each of these elements of one tensor in one step, int64 [n].

    The bits of an element depend on the arguments alone, not on the backend, the chunk or the rank that draws them.

    Args:
        key: seed + 2^32 * the tensor's index in the optimizer.
        step: a number, or a tensor of shape [] on the device, used without a host sync.
        stream: PARAM, EXP_AVG or EXP_AVG_SQ.
        indices: int64 [n], positions of the elements in the whole tensor.
    """
    block, which = (indices >> 3).unique_consecutive(return_inverse=True)  # one call of philox for eight elements
    high = (block >> 32) | stream << 30
    words = philox(
        [
            block & _MASK,
            high,
            torch.zeros_like(block).add_(step.to(torch.int64) if isinstance(step, Tensor) else step),
            torch.zeros_like(block),
        ],
        (key & _MASK, key >> 32),
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=1)[which, indices & 7]
