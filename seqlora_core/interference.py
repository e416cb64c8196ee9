"""How much one concept moves what another one sees: energies, crosstalk, overlap of subspaces, the bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .adapter import Adapter, LayerDelta
from .linalg import orthonormal_basis, principal_angles, ridge
from .statistics import Moments


def residual_energy(up: Tensor, down: Tensor, moment: Tensor) -> Tensor:
    """`E |A D x|^2 = tr(A D S D^T A^T)` for inputs of second moment S.

    up A [out, r], down D [r, in], moment S [in, in] -> scalar.
    """
    return ((up.mT @ up) * (down @ moment @ down.mT)).sum()


def whitened_energy(up: Tensor, basis: Tensor, moment: Tensor) -> Tensor:
    """The same energy for D = B^T W, given the moment already in whitened coordinates, `W S W` [d, d]."""
    return ((up.mT @ up) * (basis.mT @ moment @ basis)).sum()


def cross_energy(first: LayerDelta, second: LayerDelta, moment: Tensor) -> Tensor:
    """`E <A_i D_i x, A_j D_j x>`: the two changes' inner product on inputs of second moment S."""
    return ((first.up.mT @ second.up) * (first.down @ moment @ second.down.mT)).sum()


def adapter_energy(adapter: Adapter, moments: Moments) -> float:
    """Sum over layers of the residual energy of one adapter on one set of inputs, in float64."""
    total = 0.0
    for name, delta in adapter.layers.items():
        if name in moments.layers:
            total += residual_energy(delta.up.double(), delta.down.double(), moments[name].double()).item()
    return total


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """Mean squared cosine of the principal angles of two row spaces, as a multiple of chance.

    first [r1, d], second [r2, d] lora_down.  Two random spaces give 1.
    """
    a, b = orthonormal_basis(first.mT.double()), orthonormal_basis(second.mT.double())
    cosines = principal_angles(a, b).cos()
    chance = max(a.shape[1], b.shape[1]) / a.shape[0]
    return float(cosines.square().mean() / chance)


def sub_gaussian_bound(up: Tensor, down: Tensor, moment: Tensor, delta: float = 0.05) -> float:
    """High-probability bound on `|A D x|`: at most this with probability at least 1 - delta.  METHOD.md has the proof.

    up A [out, r], down D [r, in], moment S [in, in], for inputs `x = S^(1/2) z` whose z, with a random sign, is
    sub-Gaussian with unit parameter.  Hsu, Kakade, Zhang, "A tail inequality for quadratic forms of subgaussian random
    vectors" (2012), theorem 2.1, with t = log(1/delta):
    |M^(1/2) z|^2 <= tr M + 2 sqrt(tr(M^2) t) + 2 |M| t, where M = S^(1/2) D^T A^T A D S^(1/2), whose nonzero
    eigenvalues are those of the r x r matrix `(A^T A) (D S D^T)`.
    """
    t = math.log(1 / delta)
    root = torch.linalg.cholesky(ridge((up.mT @ up).double(), 1e-12))
    values = torch.linalg.eigvalsh(root.mT @ (down @ moment @ down.mT).double() @ root).clamp_min(0)
    return math.sqrt(values.sum() + 2 * math.sqrt(values.square().sum() * t) + 2 * values.max() * t)


@dataclass
class Report:
    """Interference of a stack, as data.

    crosstalk[i][j]: energy of concept i's change on concept j's inputs, divided by the energy of j's own change
    on them; the diagonal is 1.  overlap[i][j]: shared input subspace as a multiple of chance (weights only).
    """

    names: list[str]
    crosstalk: list[list[float]] | None
    overlap: list[list[float]]
    worst: list[dict] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def text(self) -> str:
        matrix, what = (self.crosstalk, "crosstalk (share of j's own effect that i adds on j's inputs)")
        if matrix is None:
            matrix, what = (self.overlap, "overlap of input subspaces, multiples of chance (from weights alone)")
        width = max(len(n) for n in self.names)
        lines = [what]
        for name, row in zip(self.names, matrix):
            lines.append(f"{name:>{width}}  " + " ".join(f"{v:7.3f}" for v in row))
        return "\n".join(lines + self.advice)


def interference_report(adapters: dict[str, Adapter], moments: dict[str, Moments] | None = None) -> Report:
    """Who disturbs whom, before any picture is drawn.

    adapters: name -> adapter with its strength applied.  moments: name -> second moments of the inputs that
    concept sees; None (or a name missing) leaves only what the weights say.
    """
    names = list(adapters)
    overlap = [[_mean_overlap(adapters[a], adapters[b]) for b in names] for a in names]
    report = Report(names, None, overlap)
    if moments and all(n in moments for n in names):
        own = {n: max(adapter_energy(adapters[n], moments[n]), 1e-30) for n in names}
        report.crosstalk = [[adapter_energy(adapters[i], moments[j]) / own[j] for j in names] for i in names]
        pairs = [(report.crosstalk[i][j], i, j) for i in range(len(names)) for j in range(len(names)) if i != j]
        for value, i, j in sorted(pairs, reverse=True)[:3]:
            layer = max(adapters[names[i]].layers, key=lambda n: _layer_energy(adapters[names[i]], moments[names[j]], n))
            report.worst.append({"source": names[i], "target": names[j], "crosstalk": value, "layer": layer})
            if value > 0.25:
                report.advice.append(
                    f"{names[i]} adds {value:.0%} of {names[j]}'s own effect on {names[j]}'s inputs, most in {layer}: "
                    f"lower {names[i]} to {max(0.1, round((0.25 / value) ** 0.5, 1))} or leave it out."
                )
    report.advice += _shared_triggers(adapters)
    return report


def _layer_energy(adapter: Adapter, moments: Moments, name: str) -> float:
    delta = adapter.layers[name]
    return residual_energy(delta.up, delta.down, moments[name]).item() if name in moments.layers else 0.0


def _mean_overlap(first: Adapter, second: Adapter) -> float:
    common = [n for n in first.layers if n in second.layers]
    if not common:
        return 0.0
    return sum(subspace_overlap(first.layers[n].down, second.layers[n].down) for n in common) / len(common)


def _shared_triggers(adapters: dict[str, Adapter]) -> list[str]:
    owners: dict[str, list[str]] = {}
    for name, adapter in adapters.items():
        for trigger in adapter.triggers:
            owners.setdefault(trigger.lower(), []).append(name)
    return [
        f"{' and '.join(names)} share the trigger {trigger!r}: one prompt word calls both, retrain one with its own."
        for trigger, names in owners.items()
        if len(names) > 1
    ]
