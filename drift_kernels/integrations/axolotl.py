"""For axolotl: a plugin that reads `drift:` in its YAML."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .in_use import unwrap_optimizer
from .settings import drift_settings
from .transformers import use_drift

PLUGIN = f"{__name__}.DriftPlugin"

# The value of `optimizer:`. axolotl and transformers do not know it, so a run stops before it trains if the plugin is
# not named or cannot be imported (which axolotl ignores).
OPTIMIZER = "drift_adamw"

# Keys from which axolotl would make other param groups or optimizer arguments.
_OTHER_GROUPS = (
    "embedding_lr",
    "embedding_lr_scale",
    "loraplus_lr_ratio",
    "lr_groups",
    "optim_args",
    "optim_target_modules",
)

_REFUSED = {
    **dict.fromkeys(_OTHER_GROUPS, "it has one learning rate, and its options belong under `drift:`"),
    "deepspeed": "ZeRO flattens parameters, which loses their names: use fsdp_config with fsdp_version 2",
    "lisa_step_interval": "layers that are frozen when the optimizer is created would not be trained later",
    "relora": "its restarts merge the adapters into the weights, which the prior would not notice",
}


class DriftPlugin(BasePlugin):
    """Makes axolotl train with a `FusedDriftAdamW`, by three entries of its YAML::

        plugins: [drift_kernels.integrations.axolotl.DriftPlugin]
        optimizer: drift_adamw
        drift: {prior: FOLDER, alpha: 1.0}

    `drift:` takes the keys of `drift_settings`. lr, betas, eps, weight_decay and max_grad_norm are axolotl's own.
    """

    def get_input_args(self) -> str:
        """Return the class that checks the plugin's part of the configuration."""
        return f"{__name__}.DriftArgs"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        # TrainingArguments accept only names that transformers knows.
        """Return the arguments of the Trainer that differ with `drift:`.

        Args:
            cfg: axolotl's configuration.
        """
        return {"optim": "adamw_torch"} if cfg.drift else {}

    def add_callbacks_pre_trainer(self, cfg: Any, model: nn.Module) -> list[TrainerCallback]:
        """Return a callback that checks the optimizer when training starts.

        Args:
            cfg: axolotl's configuration.
            model: the model.
        """
        return [_Guard()] if cfg.drift else []

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        # axolotl 0.19 does not call a plugin's create_optimizer. By now adapters are added and layers frozen.
        """Call `use_drift` with the settings under `drift:`.

        Args:
            cfg: axolotl's configuration.
            trainer: axolotl's trainer.

        Raises:
            TypeError, ValueError, FileNotFoundError, PriorError: as `drift_settings` and `use_drift`.
        """
        if cfg.drift:
            use_drift(trainer, **drift_settings(cfg.to_dict()["drift"]))


class _Guard(TrainerCallback):
    """Stops a run in which post_trainer_create was not called, as another version of axolotl might do."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        unwrap_optimizer(optimizer)


class DriftArgs(BaseModel):
    """The plugin's part of axolotl's configuration.

    A plugin stays loaded for later configurations of the same process, which need not contain it.

    Attributes:
        drift: the settings under `drift:`, or None.
    """

    drift: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def check_drift(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the configuration unchanged, if it is valid.

        Args:
            given: the whole configuration.

        Raises:
            ValueError: one of the three entries is there without the others, or an entry cannot be combined with them.
            TypeError, FileNotFoundError: as `drift_settings`.
        """
        there = {
            f"plugins: [{PLUGIN}]": PLUGIN in (given.get("plugins") or ()),
            f"optimizer: {OPTIMIZER}": str(given.get("optimizer")) == OPTIMIZER,
            "drift: {prior: FOLDER, ...}": bool(given.get("drift")),
        }
        if not any(there.values()):
            return given
        if missing := [entry for entry, is_there in there.items() if not is_there]:
            raise ValueError(f"DRIFT requires three entries; missing: {'; '.join(missing)}")
        for key, reason in _REFUSED.items():
            if given.get(key):
                raise ValueError(f"{key} cannot be combined with optimizer: {OPTIMIZER}: {reason}")
        drift_settings(given["drift"])
        return given
