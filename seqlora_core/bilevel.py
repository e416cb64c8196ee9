"""One lower step and one upper step of the bilevel fit.  No loop, no files.

Level  variable            objective
lower  A = lora_up         F(A, B; support)
upper  B = basis           F(A*(B), B; query)   on the Stiefel manifold, off earlier bases

with F = L + weight (lambda E + rho R) (objective.Objective) and lora_down `D = B^T W`, W the whitening of the layer's
inputs (subspace.Metric).  Both steps take gradients that are there already: of a plain backward pass (first order),
or, for the upper level, of `hypergradient`, which counts in how A* follows B.  Layers of one shape are stacked, so a
step costs a few batched products however many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Adapter, LayerDelta
from .interference import whitened_energy
from .linalg import retract, tangent
from .optimisers import make_optimiser
from .sketch import Operator

HALVINGS = 30  # of a line search, at most
ARMIJO = 1e-4  # share of what the slope foresees by which the objective must fall


@dataclass
class Group:
    """Layers of one shape, stacked along the first dimension (n layers).

    up [n, out, r]; basis [n, d, r]; white [n, d, d]; moment [n, d, d] is what the energy is measured on, in
    whitened coordinates; scale [n] divides each layer's energy by that of the layer's own output;
    occupied [n, d, k] or None.  Of wide layers white and moment are operators, moment in plain coordinates; one serves
    several layers in a row that read the same input.
    """

    names: list[str]
    up: Tensor
    basis: Tensor
    white: Tensor | Operator
    moment: Tensor | Operator
    scale: Tensor
    occupied: Tensor | None

    def down(self) -> Tensor:
        """lora_down of each layer, [n, r, d]"""
        return (self.white @ self.basis).mT if isinstance(self.white, Operator) else self.basis.mT @ self.white


def live_layers(groups: list[Group]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (down, up), differentiable in the groups' factors: what attach.Attachment adds."""
    layers = {}
    for group in groups:
        for name, down, up in zip(group.names, group.down().unbind(), group.up.unbind()):
            layers[name] = (down, up)
    return layers


def to_adapter(groups: list[Group]) -> Adapter:
    """The fitted concept as an ordinary LoRA (detached copies).

    Layers that no gradient reached are left out: some models compute what nothing uses, such as the last block's text.
    """
    layers = {n: LayerDelta(d.detach().clone(), u.detach().clone()) for n, (d, u) in live_layers(groups).items() if u.any()}
    return Adapter(layers)


def mean_energy(groups: list[Group]) -> Tensor:
    """E(A, B): residual interference energy of each layer over the layer's own output energy, mean over layers; 0 of none."""
    if not groups:
        return torch.zeros(())
    total = sum((whitened_energies(g) * g.scale).sum() for g in groups)
    return total / sum(len(g.names) for g in groups)


def whitened_energies(group: Group) -> Tensor:
    """[n]"""
    if isinstance(group.moment, Operator):
        down = group.down()
        return ((group.up.mT @ group.up) * (down @ (group.moment @ down.mT))).sum((1, 2))
    return torch.func.vmap(whitened_energy)(group.up, group.basis, group.moment)


class LowerLevel:
    """An optimiser on lora_up."""

    def __init__(self, groups: list[Group], rate: float, optimiser: str = "adam", decay: float = 0.0):
        self.rate = rate
        self.optimiser = make_optimiser(optimiser, [g.up for g in groups], rate, decay) if groups else None

    def step(self, scale: float = 1.0) -> None:
        """One step, at `scale` times the rate, from the gradients that a backward pass left on the groups' `up`."""
        if self.optimiser is not None:
            self.optimiser.param_groups[0]["lr"] = scale * self.rate
            self.optimiser.step()


class UpperLevel:
    """Riemannian Adam on the bases: the tangent gradient's moments, then a retraction.

    After Becigneul and Ganea, "Riemannian Adaptive Optimization Methods" (2019), with the first moment carried
    over by projection to the new tangent space (as geoopt's RiemannianAdam does).
    """

    def __init__(self, groups: list[Group], rate: float, retraction: str = "qr", betas=(0.9, 0.99)):
        self.groups, self.rate, self.retraction, self.betas, self.count = groups, rate, retraction, betas, 0
        self.first = [torch.zeros_like(g.basis) for g in groups]
        self.second = [torch.zeros_like(g.basis) for g in groups]

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """One step, at `scale` times the rate, from the gradients that a backward pass left on the groups' `basis`."""
        self.count += 1
        b1, b2 = self.betas
        for group, first, second in zip(self.groups, self.first, self.second):
            direction = tangent(group.basis, group.basis.grad, group.occupied)
            first.mul_(b1).add_(direction, alpha=1 - b1)
            second.mul_(b2).addcmul_(direction, direction, value=1 - b2)
            step = first / (1 - b1**self.count) / ((second / (1 - b2**self.count)).sqrt() + 1e-8)
            step = tangent(group.basis, step, group.occupied)
            group.basis.copy_(retract(group.basis, -scale * self.rate * step, group.occupied, self.retraction))
            first.copy_(tangent(group.basis, first, group.occupied))

    @torch.no_grad()
    def search(self, objective: Callable[[], float], scale: float = 1.0) -> None:
        """One step by line search, from the gradients now on the bases: `objective` never rises.

        Moves the bases along minus the Riemannian gradient, at first as far as a step of Adam's at `scale` times the rate,
        then half as far until Armijo's condition holds (Absil, Mahony, Sepulchre 2008, section 4.2); if it never does, they
        stay.  objective: its value at the bases as they are.
        """
        before, bases = objective(), [g.basis.clone() for g in self.groups]
        directions = [tangent(g.basis, g.basis.grad, g.occupied) for g in self.groups]
        slope = float(sum(d.square().sum() for d in directions))
        length = scale * self.rate * (sum(d.numel() for d in directions) / max(slope, 1e-30)) ** 0.5
        for _ in range(HALVINGS):
            for group, basis, direction in zip(self.groups, bases, directions):
                group.basis.copy_(retract(basis, -length * direction, group.occupied, self.retraction))
            if objective() <= before - ARMIJO * length * slope:
                return
            length /= 2
        for group, basis in zip(self.groups, bases):
            group.basis.copy_(basis)

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Norm of the Riemannian gradient over all layers, from the gradients now on the bases."""
        squares = [tangent(g.basis, g.basis.grad, g.occupied).square().sum() for g in self.groups]
        return float(sum(squares).sqrt())
