"""The result of verifying a prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Verification:
    """The result of `Prior.verify`: how many deltas were checked by checksum, how many only by norm (because the prior
    was built before there were checksums), and the faults found, by canonical name."""

    by_checksum: int
    by_norm: int
    faults: Mapping[str, str]

    @property
    def intact(self) -> bool:
        """Whether no faults were found."""
        return not self.faults

    def summary(self) -> str:
        """The counts, and one line for each faulty delta."""
        checked = self.by_checksum + self.by_norm
        lines = [f"{checked - len(self.faults)} of {checked} deltas are intact"]
        if self.by_norm:
            lines.append(
                f"  {self.by_norm} were checked only by norm, which does not detect small changes, because the prior "
                "was built before checksums were recorded"
            )
        return "\n".join(lines + [f"  {name}: {fault}" for name, fault in self.faults.items()])
