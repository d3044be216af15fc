"""torch's global settings do not change what we compute or allocate."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import drift_kernels
from drift_kernels import FusedDriftAdamW, GradientBias, Prior, attach_prior, bias_gradients_, build_prior

PACKAGE = Path(drift_kernels.__file__).parent
F32, BF16 = torch.float32, torch.bfloat16

SHAPES = {
    "layers.0.mlp.up_proj.weight": (64, 128),
    "layers.0.mlp.down_proj.weight": (40, 120),
    "layers.1.mlp.up_proj.weight": (5, 7),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def flushing_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


SETTINGS: dict[str, Callable[[], Any]] = {
    "default dtype bfloat16": lambda: default_dtype(BF16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=BF16),
    "deterministic algorithms": deterministic,
    "inference mode": lambda: torch.inference_mode(),
    "no grad": torch.no_grad,
    "flush denormals": flushing_denormals,
}

DTYPES = [F32, BF16, torch.int8, torch.float8_e4m3fn]

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"prior_scaling": "adaptive_cosine", "max_grad_norm": 1.0},
    "int8": {"state_dtype": "int8", "prior_scaling": "absolute", "normalize_to_param": True},
    "stochastic": {"state_dtype": BF16, "rounding": "stochastic", "prior_scaling": "gradnorm"},
    "masters": {"master_weights": True, "prior_scaling": "decoupled"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert, a base, and priors of them."""
    folder = tmp_path_factory.mktemp("settings")
    generator = torch.Generator().manual_seed(0)
    for role, scale in (("expert", 0.11), ("base", 0.1)):
        weights = {name: (scale * torch.randn(shape, generator=generator)).to(BF16) for name, shape in SHAPES.items()}
        write_checkpoint(folder / role, {f"model.{name}": weight for name, weight in weights.items()})
    for dtype in DTYPES:
        built(folder, str(dtype), dtype)
    return folder


def inputs(dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], list[dict[str, Tensor]]]:
    """Parameters and the gradients of three steps, the same in every call."""
    generator = torch.Generator().manual_seed(1)

    def draw() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}

    return {name: nn.Parameter(data) for name, data in draw().items()}, [draw() for _ in range(3)]


def built(folder: Path, out: str, dtype: torch.dtype) -> Prior:
    return build_prior(folder / "expert", folder / "base", folder / out, dtype=dtype, overwrite=True)


def steps(prior: Any, options: dict[str, Any], setting: Callable[[], Any], backend: str) -> dict[str, Tensor]:
    """The result of three steps under a setting, the last by an optimizer that has loaded the state."""
    params, grads = inputs(F32 if options is OPTIONS["float32"] else BF16)
    with setting():
        optimizer = FusedDriftAdamW(params.items(), lr=0.01, prior=prior, seed=3, backend=backend, **options)
        for step, of_step in enumerate(grads):
            for name, p in params.items():
                p.grad = of_step[name]
            if step == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = FusedDriftAdamW(params.items(), lr=0.01, prior=prior, seed=3, backend=backend, **options)
                optimizer.load_state_dict(saved)
            optimizer.step()
    found = {name: p.detach() for name, p in params.items()}
    return found | {f"{n}.{k}": v for n, p in params.items() for k, v in optimizer.state[p].items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].device == tensor.device, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_steps(options: str, setting: str, backend: str, folder: Path) -> None:
    if backend == "reference" and setting == "flush denormals":
        pytest.skip("the reference is torch's own arithmetic, which flushes them")
    prior = Prior.open(folder / str(torch.int8 if options == "int8" else BF16))
    expected = steps(prior, OPTIONS[options], SETTINGS["no grad"], backend)
    same(steps(prior, OPTIONS[options], SETTINGS[setting], backend), expected)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_building_and_opening_a_prior(dtype: torch.dtype, setting: str, folder: Path) -> None:
    expected = Prior.open(folder / str(dtype))
    with SETTINGS[setting]():
        found = built(folder, "set", dtype)
        loaded = {name: found.load(name) for name in found.names}
        opened = Prior.open(folder / str(dtype))
        for name in opened.names:
            opened.load(name)
        mapping = Prior.from_mapping(loaded)
    assert found.fingerprint == expected.fingerprint
    assert found.record["tensors"] == expected.record["tensors"]
    same(loaded, {name: expected.load(name) for name in expected.names})
    plain = Prior.from_mapping(loaded)
    assert mapping.fingerprint == plain.fingerprint
    assert [mapping.info(name) for name in plain.names] == [plain.info(name) for name in plain.names]


@pytest.mark.parametrize("setting", SETTINGS)
def test_biases(setting: str, folder: Path) -> None:
    prior = Prior.open(folder / str(BF16))
    results = []
    for context in (SETTINGS["no grad"], SETTINGS[setting]):
        params, grads = inputs(BF16)
        with context():
            bias = GradientBias(params.items(), prior, alpha=0.3)
            for of_step in grads[:2]:
                for name, p in params.items():
                    p.grad = of_step[name]
                bias.apply_()
                bias_gradients_(params.items(), prior, 0.2)
        results.append({name: p.grad.clone() for name, p in params.items()})
    same(results[1], results[0])


def test_after_a_first_step_in_inference_mode_training_goes_on() -> None:
    params = [nn.Parameter(torch.ones(40)) for _ in range(2)]
    optimizer = FusedDriftAdamW(params[:1], lr=0.1, capturable=True)
    theirs = FusedDriftAdamW(params[1:], lr=0.1, capturable=True)
    for step in range(3):
        for p in params:
            p.grad = torch.full((40,), 1.0 + step)
        with torch.inference_mode(step == 0):
            optimizer.step()
        theirs.step()
    assert torch.equal(params[0], params[1])
    assert not any(value.is_inference() for value in optimizer.state[params[0]].values())


def test_a_step_under_fake_tensors_is_an_error_and_changes_nothing() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = FusedDriftAdamW([param])
    param.grad = torch.ones(4)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="under FakeTensorMode"):
        optimizer.step()
    assert not optimizer.state.get(param)
    optimizer.step()
    assert bool((param < 1).all())


def test_what_is_made_and_used_inside_a_compiled_function() -> None:
    """`torch.compile` skips our constructors and steps, like torch's own."""

    def train(p: Tensor, deltas: dict[str, Tensor]) -> Tensor:
        optimizer = FusedDriftAdamW([("w", p)], lr=0.1, prior=deltas, prior_scaling="absolute")
        bias = GradientBias([("w", p)], deltas, prior_scaling="absolute")
        bias.apply_()
        optimizer.step()
        return p.grad * 1

    deltas = {"w": torch.arange(1.0, 6.0)}
    results = []
    for function in (train, torch.compile(train, backend="eager")):
        param = nn.Parameter(torch.ones(5))
        param.grad = torch.ones(5)
        grad = function(param, deltas)
        results.append({"param": param.detach(), "grad": grad})
    same(results[1], results[0])


def test_hooks_inside_autocast() -> None:
    model = nn.Linear(8, 8, bias=False)
    deltas, x = {"weight": torch.randn(8, 8)}, torch.randn(3, 8)
    handle = attach_prior(model, deltas, alpha=0.5, prior_scaling="absolute")
    with torch.autocast("cpu", dtype=BF16):
        model(x).sum().backward()
    biased = model.weight.grad.clone()
    handle.remove()
    model.zero_grad()
    with torch.autocast("cpu", dtype=BF16):
        model(x).sum().backward()
    assert torch.equal(biased, model.weight.grad - 0.5 * deltas["weight"])


FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros",
}  # fmt: skip


def test_whatever_is_made_says_its_dtype_and_device() -> None:
    """All our code sets dtype and device explicitly: users may change the defaults."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
                assert {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}, f"{path.name}:{node.lineno}"
