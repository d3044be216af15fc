"""A plot of how far apart two models are, layer by layer: the paper's diagnosis of why merging fails."""

from __future__ import annotations

import os

from .names import layer_of, module_of
from .prior import Prior
from .summary import Group, group_deltas

_COLORMAPS = {"attn": "Blues", "mlp": "Oranges", "norm": "Greens", "other": "Greys"}
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MARKERS = "os^Dv<>"


def plot_prior(prior: Prior, path: str | os.PathLike[str]) -> None:
    """Plot norm(delta)/norm(W) and the cosine of expert and base, per layer and projection, to an image file.

    Raises ImportError if matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            f"plotting a prior requires matplotlib: pip install 'drift_kernels[plot]' ({error})"
        ) from error

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    lines = projection_lines(prior)
    for module, colormap in _COLORMAPS.items():
        members = {label: groups for (of_module, label), groups in lines.items() if of_module == module}
        for rank, label in enumerate(sorted(members, key=lambda x: _ORDER.index(x) if x in _ORDER else len(_ORDER))):
            groups = members[label]
            color = colormaps[colormap](0.95 - 0.5 * rank / max(1, len(members) - 1))
            style = {"color": color, "marker": _MARKERS[rank % len(_MARKERS)], "markersize": 4, "linewidth": 1.2}
            layers = sorted(groups)
            above.plot(layers, [groups[layer].ratio for layer in layers], label=label, **style)
            below.plot(layers, [groups[layer].cosine for layer in layers], **style)
    above.set_ylim(bottom=0)
    above.set_ylabel("norm(delta) / norm(W)")
    below.set_ylabel("cosine(expert, base)")
    below.set_xlabel("layer")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    names = {role: source["name"] for role, source in prior.record["sources"].items()}
    figure.suptitle(", ".join(f"{role}: {name}" for role, name in names.items()), fontsize=11)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def projection_lines(prior: Prior) -> dict[tuple[str, str], dict[int, Group]]:
    """(module, projection) -> layer -> the group of its weights, without biases. Experts of a layer form one group."""

    def key(name: str) -> tuple[str, str, int] | None:
        layer, stem = layer_of(name), name.removesuffix(".weight")
        if layer is None or stem.endswith("bias"):
            return None
        return module_of(name), stem.rpartition(".")[2], layer

    lines: dict[tuple[str, str], dict[int, Group]] = {}
    for (module, label, layer), group in group_deltas(prior, key).items():
        lines.setdefault((module, label), {})[layer] = group
    return lines
