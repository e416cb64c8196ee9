"""How much one concept moves what another one sees: energies, crosstalk, overlap of subspaces, the bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .adapter import LayerDelta
from .linalg import acting_directions, ridge
from .sketch import Sketch


def residual_energy(up: Tensor, down: Tensor, moment: Tensor) -> Tensor:
    """`E |A D x|^2 = tr(A D S D^T A^T)` for inputs of second moment S.

    up A [out, r], down D [r, in], moment S [in, in] -> scalar.
    """
    return ((up.mT @ up) * (down @ moment @ down.mT)).sum()


def whitened_energy(up: Tensor, basis: Tensor, moment: Tensor) -> Tensor:
    """The same energy for D = B^T W, given the moment already in whitened coordinates, `W S W` [d, d]."""
    return residual_energy(up, basis.mT, moment)


def sub_gaussian_bound(up: Tensor, down: Tensor, moment: Tensor, delta: float = 0.05) -> float:
    """High-probability bound on `|A D x|`: at most this with probability at least 1 - delta.  METHOD.md has the proof.

    up A [out, r], down D [r, in], moment S [in, in], for inputs `x = S^(1/2) z` whose z, with a random sign, is
    sub-Gaussian with unit parameter.  Hsu, Kakade, Zhang, "A tail inequality for quadratic forms of subgaussian random
    vectors" (2012), theorem 2.1, with t = log(1/delta):
    |M^(1/2) z|^2 <= tr M + 2 sqrt(tr(M^2) t) + 2 |M| t, where M = S^(1/2) D^T A^T A D S^(1/2), whose nonzero
    eigenvalues are those of the r x r matrix `(A^T A) (D S D^T)`.
    """
    t = math.log(1 / delta)
    up, down, moment = up.double(), down.double(), moment.double()
    root = torch.linalg.cholesky(ridge(up.mT @ up, 1e-12))
    values = torch.linalg.eigvalsh(root.mT @ (down @ moment @ down.mT) @ root).clamp_min(0)
    return math.sqrt(values.sum() + 2 * math.sqrt(values.square().sum() * t) + 2 * values.max() * t)


def dense_energy(change: Tensor, moment: Tensor | Sketch) -> float:
    """`E |C x|^2 = tr(C S C^T)` of a dense change C [out, in] on inputs of second moment S"""
    if isinstance(moment, Sketch):
        floor = moment.floor.to(change)
        along = change @ moment.vectors.to(change)
        return float((along.square() * (moment.values.to(change) - floor)).sum() + floor * change.square().sum())
    return float(((change @ moment.to(change)) * change).sum())


def energies(deltas: list[LayerDelta | None], moments: list[Tensor | Sketch | None]) -> Tensor:
    """[i, j]: residual energy of change i on inputs of second moment j, in one layer; 0 where either is None.

    Costs N^2 r d min(d, k) operations for N changes of rank r, k being the kept pairs of a sketch; sketches stay sketches.
    """
    out = torch.zeros(len(deltas), len(moments), dtype=torch.float64)
    places = [i for i, d in enumerate(deltas) if d is not None]
    if not places:
        return out
    widest = max(deltas[i].rank for i in places)
    down = torch.stack([_padded(deltas[i].down, widest) for i in places])
    grams = torch.stack([_padded(_padded(deltas[i].up.mT @ deltas[i].up, widest).mT, widest) for i in places])
    plain = down @ down.mT
    for j, moment in enumerate(moments):
        if isinstance(moment, Sketch):
            floor, along = moment.floor.to(down), down @ moment.vectors.to(down)
            seen = (along * (moment.values.to(down) - floor)) @ along.mT + floor * plain
        elif moment is not None:
            seen = (down @ moment.to(down)) @ down.mT
        else:
            continue
        out[places, j] = (grams * seen).sum((1, 2)).double()
    return out


def _padded(matrix: Tensor, rows: int) -> Tensor:
    """The matrix with rows of zeros below, `rows` in all"""
    return torch.cat([matrix, matrix.new_zeros(rows - matrix.shape[0], matrix.shape[1])])


def overlaps(deltas: list[LayerDelta | None]) -> Tensor:
    """[i, j]: mean squared cosine of the principal angles of the input spaces of changes i and j, as a multiple of chance.

    In one layer; two random spaces give 1.  nan where either is None or does nothing.
    """
    out = torch.full((len(deltas), len(deltas)), math.nan, dtype=torch.float64)
    places = [i for i, d in enumerate(deltas) if d is not None and d.acts]
    if not places:
        return out
    found: dict[int, Tensor] = {}
    for shape in {tuple(deltas[i].up.shape) for i in places}:  # of one rank together: a hundred small ones take long one by one
        alike = [i for i in places if deltas[i].up.shape == shape]
        sides = (torch.stack([getattr(deltas[i], side) for i in alike]) for side in ("down", "up"))
        found |= {i: basis[:, energies > 0] for i, basis, energies in zip(alike, *acting_directions(*sides))}
    bases = [found[i] for i in places]
    ranks = torch.tensor([b.shape[1] for b in bases], dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(bases)), ranks.long())
    cosines = (lambda q: q.mT @ q)(torch.cat(bases, 1)).square()
    sums = torch.zeros(len(bases), cosines.shape[1], dtype=torch.float64).index_add_(0, owner, cosines)
    sums = torch.zeros(len(bases), len(bases), dtype=torch.float64).index_add_(1, owner, sums)
    less, more = torch.minimum(ranks[:, None], ranks), torch.maximum(ranks[:, None], ranks)
    index = torch.tensor(places)
    out[index[:, None], index] = sums / less * bases[0].shape[0] / more
    return out
