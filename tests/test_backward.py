"""Steps inside the backward pass: bitwise identical to step() after it, with gradients freed early."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from drift_kernels import AlphaScheduler, FusedDriftAdamW, linear_anneal
from drift_kernels.kernels import backends
from drift_kernels.state.param_groups import named_params

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [name for name in backends.NAMES if backends.load(name).unavailable(DEVICE) is None]
SCALINGS = ["absolute", "gradnorm", "adaptive_cosine", "decoupled"]


class Net(nn.Module):
    """An embedding tied to the head, two layers, a norm, and a parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(70, 66)
        self.layers = nn.ModuleList([nn.Linear(66, 66) for _ in range(2)])
        self.norm = nn.LayerNorm(66)
        self.unused = nn.Parameter(torch.randn(5))
        self.head = nn.Linear(66, 70, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(self.norm(x))


def twins(dtype: torch.dtype = torch.float32) -> tuple[Net, Net]:
    net = Net().to(DEVICE, dtype)
    return net, copy.deepcopy(net)


def prior_of(net: Net) -> dict[str, Tensor]:
    return {name: torch.randn_like(p) * 0.1 for name, p in net.named_parameters() if p.dim() == 2}


def backward(net: nn.Module, tokens: Tensor) -> None:
    nn.functional.cross_entropy(net(tokens).float().flatten(0, 1), tokens.flatten().roll(1)).backward()


def batch() -> Tensor:
    return torch.randint(70, (2, 9), device=DEVICE)


def groups(net: nn.Module) -> list[dict[str, Any]]:
    named = list(net.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if p.dim() == 2], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.dim() != 2], "lr": 3e-3},
    ]


def assert_same(a: FusedDriftAdamW, b: FusedDriftAdamW) -> None:
    for (name, p), (_, q) in zip(named_params(a.param_groups), named_params(b.param_groups), strict=True):
        assert torch.equal(p, q), name
        if q in b.state:
            assert a.state[p].keys() == b.state[q].keys()
            for key, value in b.state[q].items():
                assert torch.equal(a.state[p][key], value), (name, key)
        elif p in a.state:
            assert float(a.state[p]["step"]) == 0.0, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_it_is_the_step_after_the_backward_bit_for_bit(backend: str, scaling: str) -> None:
    """Schedules of lr and alpha, groups, tied weights, a parameter without a gradient."""
    one, other = twins()
    options = {"lr": 1e-2, "prior": prior_of(one), "prior_scaling": scaling, "alpha": 0.5, "backend": backend}
    ours, plain = FusedDriftAdamW(groups(one), **options), FusedDriftAdamW(groups(other), **options)
    ours.attach_to_backward()
    schedules = [
        schedule
        for o in (ours, plain)
        for schedule in (AlphaScheduler(o, linear_anneal(3)), torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.7**t))
    ]
    for _ in range(2 if backend == "triton" and DEVICE.type == "cpu" else 5):
        tokens = batch()
        for net, optimizer in ((one, ours), (other, plain)):
            backward(net, tokens)
            if optimizer is ours:
                assert all(p.grad is None for p in net.parameters())
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        assert_same(ours, plain)
        if scaling in ("gradnorm", "adaptive_cosine") and plain.prior_cosine is not None:
            assert ours.prior_names == plain.prior_names
            assert torch.equal(ours.prior_cosine, plain.prior_cosine)


@pytest.mark.parametrize(
    "mode",
    [{"rounding": "stochastic"}, {"master_weights": True}, {"state_dtype": "int8", "rounding": "stochastic"}],
    ids=str,
)
def test_so_it_is_in_every_precision(mode: dict[str, Any]) -> None:
    one, other = twins(torch.bfloat16)
    ours = FusedDriftAdamW(one.named_parameters(), lr=1e-2, prior=prior_of(one), **mode)
    plain = FusedDriftAdamW(other.named_parameters(), lr=1e-2, prior=ours.prior, **mode)
    ours.attach_to_backward()
    for _ in range(3):
        tokens = batch()
        backward(one, tokens)
        ours.step()
        backward(other, tokens)
        plain.step()
        plain.zero_grad()
        assert_same(ours, plain)


def test_every_backward_pass_is_a_step_and_sees_a_new_lr_without_step() -> None:
    one, other = twins()
    ours, plain = FusedDriftAdamW(one.parameters()), FusedDriftAdamW(other.parameters())
    ours.attach_to_backward()
    for lr in (1e-2, 1e-3, 0.1):
        for optimizer in (ours, plain):
            optimizer.param_groups[0]["lr"] = lr
        tokens = batch()
        backward(one, tokens)
        backward(other, tokens)
        plain.step()
        plain.zero_grad()
    assert_same(ours, plain)


def test_losses_that_reach_different_parameters() -> None:
    one, other = twins()
    ours, plain = FusedDriftAdamW(one.parameters()), FusedDriftAdamW(other.parameters())
    ours.attach_to_backward()
    for step in range(4):
        x = torch.randn(3, 66, device=DEVICE)
        for net in (one, other):
            net.layers[step % 2](x).square().sum().backward()
        plain.step()
        plain.zero_grad()
        for optimizer in (ours, plain):
            optimizer.param_groups[0]["lr"] *= 0.5
    assert_same(ours, plain)
    assert float(ours.state[one.layers[0].weight]["step"]) == 2.0


def test_gradients_are_freed_one_by_one() -> None:
    """When a parameter's gradient arrives, those of later layers have been freed."""
    layers = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(6)]).to(DEVICE)
    optimizer = FusedDriftAdamW(layers.parameters())
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def count(param: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(param.grad))
        most = max(most, sum(ref() is not None for ref in alive))

    for p in layers.parameters():
        p.register_post_accumulate_grad_hook(count)
    handle = optimizer.attach_to_backward()
    for _ in range(2):
        layers(torch.randn(2, 64, device=DEVICE)).sum().backward()
    assert most <= 2
    handle.remove()
    layers(torch.randn(2, 64, device=DEVICE)).sum().backward()
    assert all(p.grad is not None for p in layers.parameters())


def test_removed_it_is_as_before() -> None:
    one, other = twins()
    ours, plain = FusedDriftAdamW(one.parameters()), FusedDriftAdamW(other.parameters())
    for attached in (False, True, False, True):
        handle = ours.attach_to_backward() if attached else None
        tokens = batch()
        for net, optimizer in ((one, ours), (other, plain)):
            backward(net, tokens)
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            handle.remove()
            handle.remove()
        assert_same(ours, plain)


def test_a_saved_state_goes_on_and_a_copy_is_not_attached() -> None:
    one, other = twins()
    ours, plain = FusedDriftAdamW(one.parameters()), FusedDriftAdamW(other.parameters())
    ours.attach_to_backward()
    for _ in range(2):
        tokens = batch()
        for net, optimizer in ((one, ours), (other, plain)):
            backward(net, tokens)
            optimizer.step()
            optimizer.zero_grad()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(ours, plain)
    assert copy.deepcopy(ours)._in_backward is None


def test_a_closure_is_run() -> None:
    one, other = twins()
    ours, plain = FusedDriftAdamW(one.parameters()), FusedDriftAdamW(other.parameters())
    ours.attach_to_backward()
    tokens = batch()
    for net, optimizer in ((one, ours), (other, plain)):

        def closure(net: Net = net) -> float:
            backward(net, tokens)
            return 42.0

        assert optimizer.step(closure) == 42.0
    assert_same(ours, plain)


def test_what_cannot_be() -> None:
    one, _ = twins()
    with pytest.raises(ValueError, match=r"max_grad_norm must be None, got 1\.0"):
        FusedDriftAdamW(one.parameters(), max_grad_norm=1.0).attach_to_backward()
    ours = FusedDriftAdamW(one.parameters())
    handle = ours.attach_to_backward()
    with pytest.raises(RuntimeError, match="already attached to the backward pass"):
        ours.attach_to_backward()
    one.unused.grad = torch.ones_like(one.unused)
    with pytest.raises(RuntimeError, match="has a gradient that no backward pass has used"):
        ours.step()
    one.unused.grad = None
    scaler = torch.amp.GradScaler(DEVICE.type)
    scaler.scale(one(batch()).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler cannot be combined with attach_to_backward"):
        scaler.step(ours)
    handle.remove()


def test_an_unusable_gradient_is_named_and_changes_nothing() -> None:
    embedding = nn.Embedding(10, 4, sparse=True).to(DEVICE)
    before = embedding.weight.detach().clone()
    ours = FusedDriftAdamW(embedding.named_parameters())
    ours.attach_to_backward()
    with pytest.raises(TypeError, match="the gradient of parameter weight is sparse"):
        embedding(torch.tensor([1, 2], device=DEVICE)).sum().backward()
    assert torch.equal(embedding.weight, before)
    assert float(ours.state[embedding.weight]["step"]) == 0.0


@pytest.mark.parametrize("attached", [False, True])
def test_autograd_knows_that_parameters_have_changed(attached: bool) -> None:
    """As with torch's optimizers, a graph that needs the old values raises."""
    param = nn.Parameter(torch.randn(4, device=DEVICE))
    ours = FusedDriftAdamW([param])
    if attached:
        ours.attach_to_backward()
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    ours.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_value_that_the_rest_of_the_pass_needs_is_not_changed_in_silence() -> None:
    """`w` is complete, and updated, before the product that holds it as a constant runs backward."""
    w, x = (nn.Parameter(torch.randn(4, device=DEVICE)) for _ in range(2))
    FusedDriftAdamW([w, x]).attach_to_backward()
    product = w.detach() * x
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (product.sum() + (w * 2).sum()).backward()


def test_after_a_pass_that_failed_the_next_is_a_step_as_usual() -> None:
    one, other = twins()
    ours, plain = FusedDriftAdamW(one.parameters()), FusedDriftAdamW(other.parameters())
    ours.attach_to_backward()
    failing = one.layers[0].weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(one, batch())
    failing.remove()
    assert {float(ours.state[p]["step"]) for p in one.norm.parameters()} == {1.0}
    assert float(ours.state[one.embed.weight]["step"]) == 0.0
    one.zero_grad()
    other.load_state_dict(one.state_dict())
    plain.load_state_dict(ours.state_dict())
    for lr in (1e-2, 1e-3):
        tokens = batch()
        for net, optimizer in ((one, ours), (other, plain)):
            optimizer.param_groups[0]["lr"] = lr
            backward(net, tokens)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, plain)


def test_checkpointed_layers_and_accumulated_gradients() -> None:
    """Recomputed in the pass, each parameter still gets one gradient, including what was accumulated before."""
    one, other = twins()
    x = torch.randn(3, 66, device=DEVICE)
    for net in (one, other):
        net.layers[0](x).sum().backward()
    ours, plain = FusedDriftAdamW(one.parameters()), FusedDriftAdamW(other.parameters())
    ours.attach_to_backward()
    for net in (one, other):
        hidden = x
        for layer in net.layers:
            hidden = torch.utils.checkpoint.checkpoint(
                lambda h, layer=layer: layer(h).tanh(), hidden, use_reentrant=False
            )
        hidden.square().sum().backward()
    plain.step()
    plain.zero_grad()
    assert_same(ours, plain)
