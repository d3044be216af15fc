"""Writes the files of this folder with the imported drift_kernels: see README.md. The tests also import it, for the
definitions of the runs and `numbers`, so it uses only the package's public names."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

import drift_kernels
from drift_kernels import AlphaScheduler, FusedDriftAdamW, Prior, build_prior, linear_anneal

SAVED_AFTER, ALL_STEPS = 3, 7  # steps; the schedule of alpha reaches 0 at the last
LATE = {"visual.proj.weight": 1, "model.embed_tokens.weight": SAVED_AFTER}  # the first step with a gradient
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

Shapes = Mapping[str, tuple[int, ...]]

SMALL: Shapes = {
    "model.embed_tokens.weight": (5, 16),
    "model.layers.0.self_attn.q_proj.weight": (7, 31),
    "model.layers.0.self_attn.q_proj.bias": (7,),
    "model.layers.0.mlp.up_proj.weight": (2, 128),
    "model.layers.1.mlp.down_proj.weight": (5, 29),
    "model.norm.weight": (31,),
    "visual.proj.weight": (4, 6),
}
# Large enough for states stored as codes: up_proj has scales per row, down_proj flat ones.
ROWS: Shapes = {"model.layers.0.mlp.up_proj.weight": (32, 128), "model.layers.0.self_attn.q_proj.bias": (7,)}
FLAT: Shapes = {"model.layers.1.mlp.down_proj.weight": (39, 113), "model.norm.weight": (31,)}
LARGE: Shapes = {**ROWS, **FLAT}


def numbers(shape: tuple[int, ...], stream: int) -> Tensor:
    """float32 in (-1, 1) of many magnitudes, from integers only, so independent of torch's generators."""
    x = (torch.arange(math.prod(shape)) + 1_000_003 * stream) % 2**31
    for _ in range(3):
        x = (x * 1_103_515_245 + 12_345) % 2**31
        x = x ^ (x >> 15)
    mantissa = ((x >> 7) - 2**23).to(F32) / 2**23
    return (mantissa * torch.tensor([1.0, 2**-2, 2**-5, 2**-9])[x & 3]).view(shape)


def digest(tensor: Tensor) -> str:
    """The first half of the sha256 of dtype, shape and bytes."""
    content = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode() + content).hexdigest()[:32]


# Priors


@dataclass(frozen=True)
class Built:
    """How a prior was built."""

    dtype: torch.dtype
    shapes: Shapes = field(default_factory=lambda: SMALL)
    options: Mapping[str, Any] = field(default_factory=dict)


NAME_MAP = {"name_map": {"transformer.h.": "layers."}}
PRIORS = {
    "prior_float32": Built(F32),
    "prior_bfloat16": Built(BF16),
    "prior_int8": Built(torch.int8, LARGE),
    "prior_float8_e4m3fn": Built(torch.float8_e4m3fn),
    "prior_of_a_layer": Built(
        BF16,
        {name.replace("model.layers", "transformer.h"): shape for name, shape in SMALL.items()},
        {**NAME_MAP, "modules": ("mlp", "re:norm"), "layers": [1], "max_shard_bytes": 200},
    ),
}


def live_model(shapes: Shapes) -> list[tuple[str, Tensor]]:
    """Parameters under other names than the checkpoint's; one has another shape, one is missing."""
    names = {name.replace("model.layers", "model.language_model.layers"): shape for name, shape in shapes.items()}
    names["module.model.language_model.layers.0.mlp.up_proj.weight"] = (2, 127)
    gone = ("model.language_model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.self_attn.q_proj.bias")
    return [(name, torch.empty(shape)) for name, shape in names.items() if name not in gone]


def write_priors(out: Path) -> dict[str, Any]:
    expected = {}
    for name, built in PRIORS.items():
        with TemporaryDirectory() as folder:
            _write_checkpoint(Path(folder, "base"), {n: numbers(s, i) for i, (n, s) in enumerate(built.shapes.items())})
            _write_checkpoint(
                Path(folder, "expert"),
                {
                    n: (numbers(s, i) + 0.1 * numbers(s, 100 + i)).to(BF16)
                    for i, (n, s) in enumerate(built.shapes.items())
                },
            )
            build_prior(Path(folder, "expert"), Path(folder, "base"), out / name, dtype=built.dtype, **built.options)
        expected[name] = described(Prior.open(out / name), built.shapes)
    return expected


def _write_checkpoint(folder: Path, weights: dict[str, Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"rope_theta": 10_000.0 if folder.name == "base" else 1e6}))
    save_file(weights, folder / "model.safetensors")


INFO = ("shape", "delta_norm", "param_norm", "cosine", "stored_cosine")  # later versions may know more
COVERAGE = ("matched", "shape_mismatches", "prior_only", "model_only")


def described(prior: Prior, shapes: Shapes) -> dict[str, Any]:
    """A prior's description of itself and of a model, as in JSON."""
    coverage = prior.coverage(live_model(shapes))
    known = {name: prior.info(name) for name in prior.names}
    infos = {
        name: {**{key: getattr(info, key) for key in INFO}, "dtype": str(info.dtype)} for name, info in known.items()
    }
    content = {
        "fingerprint": prior.fingerprint,
        "infos": infos,
        "deltas": {name: digest(prior.load(name)) for name in prior.names},
        "coverage": {key: getattr(coverage, key) for key in COVERAGE},
    }
    return json.loads(json.dumps(content))


# Runs


@dataclass(frozen=True)
class Run:
    """A training run with two param groups: the weights, and the biases and norms.

    Attributes:
        groups: the hyperparameters of each group.
        options: of the optimizer.
        prior: the name of a folder, "mapping", or None.
        bitwise: whether backends are bitwise identical; their sums agree only to 1e-6.
    """

    dtype: torch.dtype
    groups: tuple[dict[str, Any], dict[str, Any]]
    shapes: Shapes = field(default_factory=lambda: SMALL)
    options: dict[str, Any] = field(default_factory=dict)
    prior: str | None = None
    bitwise: bool = True


FIRST = {"lr": 1e-2, "weight_decay": 0.1, "alpha": 0.5, "prior_scaling": "absolute"}
SECOND = {"lr": 3e-3, "weight_decay": 0.0, "alpha": -0.25, "prior_scaling": "decoupled"}
STOCHASTIC = {"rounding": "stochastic", "seed": 7}

RUNS = {
    "float32": Run(F32, ({**FIRST, "betas": (0.8, 0.95)}, {**SECOND, "eps": 1e-6, "maximize": True})),
    "float32_with_a_prior": Run(
        F32, ({**FIRST, "normalize_to_param": True}, {**SECOND, "prior_scaling": "absolute"}), prior="prior_float32"
    ),
    "float16_with_a_mapping": Run(
        F16, ({**FIRST, "lr": torch.tensor(1e-2), "alpha": torch.tensor(0.5)}, SECOND), prior="mapping"
    ),
    "bfloat16_stochastic": Run(
        BF16, (FIRST, {**SECOND, "seed": 8}), options={**STOCHASTIC, "state_dtype": BF16}, prior="prior_of_a_layer"
    ),
    "int8": Run(BF16, (FIRST, SECOND), FLAT, {**STOCHASTIC, "state_dtype": "int8"}, "prior_int8"),
    "int8_float32": Run(F32, (SECOND, FIRST), FLAT, {"state_dtype": "int8"}),
    "masters": Run(
        BF16, (FIRST, {**SECOND, "capturable": True}), options={"master_weights": True}, prior="prior_float8_e4m3fn"
    ),
    "masters_int8": Run(BF16, (FIRST, SECOND), ROWS, {"master_weights": True, "state_dtype": "int8"}, "prior_int8"),
    "with_norms": Run(
        F32,
        ({**FIRST, "prior_scaling": "adaptive_cosine"}, {**SECOND, "prior_scaling": "gradnorm"}),
        options={"max_grad_norm": 0.5},
        prior="prior_bfloat16",
        bitwise=False,
    ),
}


class Training:
    """A run with its parameters, optimizer, and schedules of lr and alpha.

    Args:
        run: the run to make.
        backend: of the optimizer.
        prior: of the run, or None.
        groups: hyperparameters that replace the run's; a state_dict has its own.
    """

    def __init__(
        self, run: Run, backend: str, prior: Any, groups: tuple[dict[str, Any], dict[str, Any]] | None = None
    ) -> None:
        self.params = {
            n: nn.Parameter(numbers(s, 200 + i).to(run.dtype)) for i, (n, s) in enumerate(run.shapes.items())
        }
        weights = [(name, p) for name, p in self.params.items() if p.dim() > 1]
        others = [(name, p) for name, p in self.params.items() if p.dim() == 1]
        hyper = groups or tuple({key: _copy(value) for key, value in group.items()} for group in run.groups)
        described_groups = [{"params": weights, **hyper[0]}, {"params": others, **hyper[1]}]
        self.optimizer = FusedDriftAdamW(described_groups, prior=prior, backend=backend, **run.options)
        self.lr_schedule = LinearLR(self.optimizer, 1.0, 0.25, total_iters=ALL_STEPS)
        self.alpha_schedule = AlphaScheduler(self.optimizer, linear_anneal(ALL_STEPS - 1))

    def steps(self, first: int, last: int) -> None:
        """Take steps first to last - 1, each with its own gradients."""
        for step in range(first, last):
            for i, (name, param) in enumerate(self.params.items()):
                late = step < LATE.get(name, 0)
                param.grad = None if late else numbers(tuple(param.shape), 1000 + 20 * step + i).to(param.dtype)
            self.optimizer.step()
            self.lr_schedule.step()
            self.alpha_schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "params": {name: param.detach().clone() for name, param in self.params.items()},
            "optimizer": self.optimizer.state_dict(),
            "lr_schedule": self.lr_schedule.state_dict(),
            "alpha_schedule": self.alpha_schedule.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(saved["params"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.lr_schedule.load_state_dict(saved["lr_schedule"])
        self.alpha_schedule.load_state_dict(saved["alpha_schedule"])

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and states, by name."""
        states = {f"{n} {key}": t for n, p in self.params.items() for key, t in self.optimizer.state[p].items()}
        return {**{name: param.detach() for name, param in self.params.items()}, **states}

    def scheduled(self) -> list[list[float]]:
        """lr and alpha of each group."""
        return [[float(group["lr"]), float(group["alpha"])] for group in self.optimizer.param_groups]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def mapping() -> dict[str, Tensor]:
    """The deltas of a prior in memory, under the names of the model."""
    covered = {name: shape for name, shape in SMALL.items() if "layers" in name}
    dtypes = (F32, BF16)
    return {name: (0.1 * numbers(s, 300 + i)).to(dtypes[i % 2]) for i, (name, s) in enumerate(covered.items())}


def prior_of(run: Run, folder: Path) -> Any:
    """The optimizer's `prior` argument for a run."""
    return mapping() if run.prior == "mapping" else run.prior and folder / run.prior


def write_runs(out: Path) -> dict[str, Any]:
    expected = {}
    for name, run in RUNS.items():
        training = Training(run, "reference", prior_of(run, out))
        training.steps(0, SAVED_AFTER)
        torch.save(training.state_dict(), out / f"{name}.pt")
        training.steps(SAVED_AFTER, ALL_STEPS)
        after = training.tensors()
        expected[name] = {"scheduled": training.scheduled(), "tensors": {key: digest(t) for key, t in after.items()}}
        if not run.bitwise:
            torch.save(after, out / f"{name}_afterwards.pt")
    return expected


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(f"written by {drift_kernels.__file__}, torch {torch.__version__}")
    content = {"torch": torch.__version__, "priors": write_priors(target), "runs": write_runs(target)}
    (target / "expected.json").write_text(json.dumps(content, indent=1) + "\n")
