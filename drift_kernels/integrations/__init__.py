"""What trainers need around `FusedDriftAdamW`. Importing this package imports no trainer; the modules named after one
do.
"""

from .for_model import drift_optimizer
from .in_use import check_in_use, unwrap_optimizer
from .named_groups import named_groups
from .settings import drift_settings
from .step_figures import step_figures

__all__ = ["check_in_use", "drift_optimizer", "drift_settings", "named_groups", "step_figures", "unwrap_optimizer"]
