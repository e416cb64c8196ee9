"""Where concepts live: which directions of each layer's whitened input earlier concepts hold, and what is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg import orthonormal_basis, project_out, top_eigenvectors, whitening

EPS = 1e-2  # ridge of the metric, in units of its mean eigenvalue
SHARE = 0.95  # of a layer's dimensions that a planned library may fill


def rank_limit(features: int, planned: int, rank: int) -> int:
    """Rank that one of `planned` concepts gets in a layer of `features` inputs: at least 1."""
    return max(1, min(rank, int(SHARE * features / max(1, planned))))


@dataclass
class Metric:
    """A layer's inner product: `<u, v> = u ridge(G) v^T` on lora_down rows.

    white `ridge(G)^(-1/2)` turns a basis B of whitened coordinates into lora_down, `D = B^T white`;
    unwhite is its inverse.  Both symmetric [d, d].
    """

    white: Tensor
    unwhite: Tensor

    @classmethod
    def of(cls, moment: Tensor, eps: float = EPS) -> Metric:
        return cls(*whitening(moment, eps))

    def down(self, basis: Tensor) -> Tensor:
        """[d, r] -> lora_down [r, d]"""
        return basis.mT @ self.white

    def basis(self, down: Tensor) -> Tensor:
        """lora_down [r, d] -> whitened directions [d, r] (a basis if it came from one)"""
        return self.unwhite @ down.mT


def occupied_basis(bases: list[Tensor], room_for: int) -> tuple[Tensor | None, int]:
    """Orthonormal basis of what earlier concepts hold, leaving at least `room_for` dimensions free.

    bases: each [d, r_i].  A full layer shares: the directions of the least singular values are given up, the
    second value says how many.
    """
    if not bases:
        return None, 0
    stacked = torch.cat(bases, dim=1)
    d = stacked.shape[0]
    if stacked.shape[1] + room_for <= d:
        return orthonormal_basis(stacked), 0
    u, s, _ = torch.linalg.svd(stacked.double(), full_matrices=False)
    keep = max(0, min(d - room_for, int((s > 1e-6 * s[0]).sum())))
    shared = int((s > 1e-6 * s[0]).sum()) - keep
    return (u[:, :keep].to(stacked.dtype) if keep else None), shared


def data_driven_basis(concept: Tensor, metric: Metric, rank: int, occupied: Tensor | None) -> Tensor:
    """Start of a concept's basis [d, rank]: the top generalised eigenvectors of (S_i, G) in the free space.

    concept: S_i [d, d].  In whitened coordinates these are the directions in which the concept's inputs are
    strongest relative to everything else's.
    """
    seen = metric.white @ concept @ metric.white
    if occupied is not None:
        seen = project_out(project_out(seen, occupied).mT, occupied)
        # the occupied space now has eigenvalue 0; push it below any free direction
        seen = seen - occupied @ occupied.mT * torch.diagonal(seen).sum()
    return orthonormal_basis(project_out(top_eigenvectors(seen, rank), occupied))
