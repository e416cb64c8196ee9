"""Second moments of wide layers in little room: the largest eigenpairs, and the trace of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ENERGY = 0.995  # share of the trace that the kept pairs hold, if MOST of them can
MOST = 128  # pairs
EXACT = 2048  # inputs up to which all eigenpairs are computed; wider moments go through torch.svd_lowrank


@dataclass
class Sketch:
    """`S ~ V diag(values) V^T + rest / (d - k) (I - V V^T)`: the trace of S is kept.

    vectors V [d, k] orthonormal; values [k], descending; rest: trace of S outside V's span.
    """

    vectors: Tensor
    values: Tensor
    rest: Tensor

    def dense(self) -> Tensor:
        """[d, d]"""
        eye = torch.eye(len(self.vectors), dtype=self.vectors.dtype, device=self.vectors.device)
        return (self.vectors * (self.values - self.floor)) @ self.vectors.mT + self.floor * eye

    @property
    def floor(self) -> Tensor:
        """Energy in each direction outside V's span"""
        d, k = self.vectors.shape
        return self.rest / max(1, d - k)

    @property
    def missed(self) -> float:
        """Share of the energy outside the kept pairs"""
        return float(self.rest / (self.rest + self.values.sum()).clamp_min(1e-30))

    def error_bound(self, up: Tensor, down: Tensor) -> float:
        """Most by which `tr(A D S D^T A^T)` and that of the sketch can differ.

        Outside V both S and the sketch lie between 0 and the next eigenvalue, which is at most the last kept one and at
        most the rest; so their difference, as an operator, is at most that.
        """
        change = ((up.mT @ up) * (down @ down.mT)).sum()
        return float(torch.minimum(self.values[-1], self.rest) * change)


def sketch(moment: Tensor, energy: float = ENERGY, most: int = MOST) -> Sketch:
    """Fewest eigenpairs of S [d, d] that hold `energy` of its trace, at most `most`.

    Wider than EXACT: Halko, Martinsson, Tropp (2011), by torch.svd_lowrank.
    """
    moment = moment.double()
    if moment.shape[0] <= EXACT:
        values, vectors = torch.linalg.eigh(moment)
        values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vectors, values, _ = torch.svd_lowrank(moment, q=most, niter=4)
    values = values.clamp_min(0)
    trace = torch.diagonal(moment).sum()
    count = min(len(values), int((values.cumsum(0) < energy * trace).sum()) + 1)
    values, vectors = values[:count], vectors[:, :count]
    return Sketch(vectors.float().contiguous(), values.float(), (trace - values.sum()).clamp_min(0).float())
