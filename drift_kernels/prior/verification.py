"""What came of reading a prior through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Verification:
    """The outcome of `Prior.verify`: how many deltas were compared with their checksum, and how many with nothing but
    their norm, since their prior is older than checksums; what is wrong, by canonical name."""

    by_checksum: int
    by_norm: int
    faults: Mapping[str, str]

    @property
    def intact(self) -> bool:
        """Nothing was found to be wrong."""
        return not self.faults

    def summary(self) -> str:
        """The counts, and a line for each delta with something wrong."""
        checked = self.by_checksum + self.by_norm
        lines = [f"{checked - len(self.faults)} of {checked} deltas are as they were built"]
        if self.by_norm:
            lines.append(
                f"  {self.by_norm} were compared by their norm alone, which small changes do not show in: the prior "
                "was built before checksums were recorded"
            )
        return "\n".join(lines + [f"  {name}: {fault}" for name, fault in self.faults.items()])
