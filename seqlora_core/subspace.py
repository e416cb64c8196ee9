"""Where concepts live: which directions of each layer's whitened input earlier concepts hold, and what is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg import orthonormal_basis, project_out, span, top_eigenvectors, whitening
from .sketch import EPS, Operator, Sketch

SHARE = 0.95  # of a layer's dimensions that a planned library may fill


def rank_limit(features: int, planned: int, rank: int) -> int:
    """Rank that one of `planned` concepts gets in a layer of `features` inputs: at least 1."""
    return max(1, min(rank, int(SHARE * features / max(1, planned))))


@dataclass
class Metric:
    """A layer's inner product: `<u, v> = u ridge(G) v^T` on lora_down rows.

    white `ridge(G)^(-1/2)` turns a basis B of whitened coordinates into lora_down, `D = B^T white`;
    unwhite is its inverse.  Both symmetric [d, d]; of a sketch of G operators that hold no such matrix.
    """

    white: Tensor | Operator
    unwhite: Tensor | Operator

    @classmethod
    def of(cls, moment: Tensor | Sketch, eps: float = EPS) -> Metric:
        """That of what G says the layer sees, with a ridge of eps mean eigenvalues"""
        return cls(*(moment.whitening(eps) if isinstance(moment, Sketch) else whitening(moment, eps)))

    @classmethod
    def plain(cls, moment: Tensor | Sketch) -> Metric:
        """Whatever G is: plain lengths and angles"""
        eye = Operator.identity(len(moment.vectors)) if isinstance(moment, Sketch) else torch.eye(len(moment))
        return cls(eye, eye)

    def down(self, basis: Tensor) -> Tensor:
        """[d, r] -> lora_down [r, d]"""
        return (self.white @ basis).mT

    def basis(self, down: Tensor) -> Tensor:
        """lora_down [r, d] -> whitened directions [d, r] (a basis if it came from one)"""
        return self.unwhite @ down.mT


def occupied_basis(bases: list[Tensor], ups: list[Tensor], room_for: int) -> tuple[Tensor | None, Tensor | None]:
    """Orthonormal basis of what earlier concepts hold, and of what they must share so that `room_for` dimensions are free.

    bases: each [d, r_i]; ups: lora_up of each, [out, r_i].  Shared are the least used directions, by the energy that all
    concepts together send through them while the base model sees its own inputs: the last eigenvectors of
    `sum_i B_i A_i^T A_i B_i^T`, which of disjoint bases are directions of one concept each.
    """
    if not bases:
        return None, None
    stacked = torch.cat(bases, dim=1)
    d = stacked.shape[0]
    if stacked.shape[1] + room_for <= d:
        return orthonormal_basis(stacked), None
    held = span(stacked.double(), 1.0)
    keep = max(0, min(d - room_for, held.shape[1]))
    seen = [(held.mT @ b.double(), u.double()) for b, u in zip(bases, ups)]
    used = sum(b @ (u.mT @ u) @ b.mT for b, u in seen)
    directions = (held @ torch.linalg.eigh(used)[1].flip(1)).to(stacked.dtype)
    kept, shared = directions[:, :keep], directions[:, keep:]
    return (kept if keep else None), (shared if shared.shape[1] else None)


def data_driven_basis(concept: Tensor | Sketch, metric: Metric, rank: int, occupied: Tensor | None) -> Tensor:
    """Start of a concept's basis [d, rank]: the top generalised eigenvectors of (S_i, G) in the free space.

    concept: S_i [d, d].  In whitened coordinates these are the directions in which the concept's inputs are
    strongest relative to everything else's.
    """
    if isinstance(metric.white, Operator):
        return _sketched_start(concept, metric.white, rank, occupied)
    seen = metric.white @ concept @ metric.white
    if occupied is not None:
        seen = project_out(project_out(seen, occupied).mT, occupied)
        # the occupied space now has eigenvalue 0; push it below any free direction
        seen = seen - occupied @ occupied.mT * torch.diagonal(seen).sum()
    return orthonormal_basis(project_out(top_eigenvectors(seen, rank), occupied))


def enough(concept: Tensor | Sketch, metric: Metric, basis: Tensor, share: float) -> int:
    """How many of the basis's first directions [d, r] hold this share of the energy that all of them see of the concept"""
    seen = concept.operator() if isinstance(concept, Sketch) else concept
    down = metric.white @ basis
    energy = (down * (seen @ down)).sum(0).cumsum(0)
    return min(basis.shape[1], 1 + int((energy < share * energy[-1]).sum()))


def _sketched_start(concept: Sketch, white: Operator, rank: int, occupied: Tensor | None) -> Tensor:
    """The same within the span of what both sketches single out: outside it all directions are alike"""
    columns = torch.cat([white @ concept.vectors, white.vectors * white.floor], 1)
    more = torch.randn(len(columns), rank, generator=torch.Generator().manual_seed(0))  # if that is too little
    found = span(project_out(columns, occupied).double(), float(white.floor)).to(columns)
    if found.shape[1] < rank:
        found = orthonormal_basis(project_out(torch.cat([found, more], 1)[:, : max(rank, found.shape[1])], occupied))
    seen = white @ found
    small = seen.mT @ (concept.operator() @ seen)
    return orthonormal_basis(project_out(found @ top_eigenvectors(small, rank), occupied))
