"""What trainers need around FusedDriftAdamW. Importing it imports no trainer; `transformers.py` here does."""

from .named_groups import named_groups
from .step_figures import step_figures, unwrap_optimizer

__all__ = ["named_groups", "step_figures", "unwrap_optimizer"]
