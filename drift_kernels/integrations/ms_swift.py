"""For ms-swift: `--optimizer drift`, with the settings in `optim_args`.

Importing this module registers the optimizer, so a plugin file is one line::

    import drift_kernels.integrations.ms_swift

In a YAML file::

    external_plugins: drift_plugin.py
    optimizer: drift
    optim_args:
      prior: prior
      alpha: 1.0

On the command line: `--optim_args '{"prior": "prior", "alpha": 1.0}'`.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from swift.callbacks import TrainerCallback, callbacks_map
from swift.optimizers import OptimizerCallback, optimizers_map

from .hooked import use_hooks
from .settings import drift_settings
from .transformers import use_drift

logger = logging.getLogger("drift_kernels")

NAME = "drift"

# Arguments that select another of swift's optimizers.
_OTHERS = ("vit_lr", "aligner_lr", "use_galore")


class DriftOptimizerCallback(OptimizerCallback):
    """Makes swift's trainers use `use_drift`, or under DeepSpeed `use_hooks` with swift's AdamW.

    Args:
        args: swift's arguments. `optim_args` has the keys of `drift_settings`.
        trainer: swift's trainer.

    Raises:
        ValueError: an invalid setting, or an argument of swift's that would have no effect.
        TypeError, FileNotFoundError: as `drift_settings`.
    """

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        self.settings = drift_settings(_given(args), "optim_args")
        if unheard := [name for name in _OTHERS if getattr(args, name, None)]:
            raise ValueError(f"{', '.join(unheard)} would have no effect with the optimizer {NAME}: leave it out")
        args.optim_args = None  # swift would parse it as AdamW's
        args.callbacks.append(NAME)


class _UseDrift(TrainerCallback):
    """Added to the trainer's callbacks from the beginning, so that a trainer that requests no optimizer is checked too
    when its training starts.
    """

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        self._in_use = False

    def on_init_end(self, *_: Any, **__: Any) -> None:
        if not self._in_use:  # called twice, since `use` inserts a callback before this one
            self._in_use = True
            use = use_hooks if self.trainer.is_deepspeed_enabled else use_drift
            use(self.trainer, **self.trainer.optimizer_callback.settings)


def _given(args: Any) -> Any:
    """`optim_args`, a string to swift, which turns a mapping in a YAML file into JSON."""
    try:
        return json.loads(args.optim_args)
    except (TypeError, ValueError):
        return args.optim_args


def _guarded(name: str, callback: type) -> type:
    """One of swift's own optimizers, which raises if the settings are ours."""

    class Guarded(callback):
        def __init__(self, args: Any, trainer: Any) -> None:
            if isinstance(_given(args), dict):
                raise ValueError(
                    f"optim_args has settings of the optimizer {NAME}, but the optimizer is {name}, which would train "
                    f"without the prior: add `--optimizer {NAME}`"
                )
            logger.warning("the plugin is loaded, but the optimizer is %s: this is plain fine-tuning", name)
            super().__init__(args, trainer)

    Guarded.__name__ = Guarded.__qualname__ = callback.__name__
    return Guarded


optimizers_map.update({name: _guarded(name, callback) for name, callback in optimizers_map.items()})
optimizers_map[NAME] = DriftOptimizerCallback
callbacks_map[NAME] = _UseDrift
