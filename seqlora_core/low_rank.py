"""Changes of a weight in as few directions as they need."""

from __future__ import annotations

import torch
from torch import Tensor

from .adapter import Adapter, LayerDelta, is_token_table
from .linalg import leading_svd

LOSS = 0.01  # share of its energy that a change may lose when it is put into low rank
FEW = 128  # directions that are looked for first


def factorised(change: Tensor, loss: float = LOSS, always: bool = False) -> LayerDelta | None:
    """The change [out, in] or [out, in, height, width] of a weight in the fewest directions that lose at most `loss` of its
    energy; None if those would take more room than the matrix itself, unless it shall be done `always`.
    """
    matrix = change.double().flatten(1)
    most = None if always else matrix.numel() // sum(matrix.shape)
    found = _leading(matrix, loss)
    if found is None and most is not None and _needed(matrix, loss) > most:
        return None
    u, s, vh = found or torch.linalg.svd(matrix, full_matrices=False)
    rank = rank_for(s, loss, matrix.square().sum())
    if most is not None and rank > most:
        return None
    root = s[:rank].sqrt()
    return LayerDelta((root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float(), tuple(change.shape[2:]))


def _leading(matrix: Tensor, loss: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """The first of a wide matrix's singular values and vectors, a tenth of the work, if they lose at most `loss` of its energy"""
    if min(matrix.shape) <= 4 * FEW:
        return None
    u, s, v = leading_svd(matrix, FEW, rounds=2)
    energy = matrix.square().sum()
    return (u, s, v.mT) if energy - s.square().sum() <= loss * energy else None


def _needed(matrix: Tensor, loss: float) -> int:
    """Directions that lose at most `loss` of its energy: by the eigenvalues of its Gram matrix, a sixth of the work of an SVD"""
    gram = matrix @ matrix.mT if len(matrix) < matrix.shape[1] else matrix.mT @ matrix
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    return rank_for(squares.sqrt(), loss, squares.sum())


def rank_for(values: Tensor, loss: float, energy: Tensor) -> int:
    """Fewest singular values (descending) without which at most `loss` of the energy is gone; at least 1."""
    missing = energy - values.square().cumsum(0)
    return min(len(values), int((missing > loss * energy).sum()) + 1)


def truncated(adapter: Adapter, rank: int | None = None) -> tuple[Adapter, float]:
    """The adapter with at most `rank` directions a layer, the largest, and the share of its energy that is lost.

    Without a rank: exact, in no more directions than a layer has.  Token tables keep a direction for each token.
    """
    layers, lost, total = {}, 0.0, 0.0
    for name, delta in adapter.layers.items():
        most = min(delta.down.shape[1], delta.up.shape[0], *([rank] if rank else []))
        if delta.rank <= most or is_token_table(name):
            layers[name] = delta
            total += float(delta.energy())
            continue
        basis, upper = torch.linalg.qr(delta.down.double().mT)
        left, s, right = torch.linalg.svd(delta.up.double() @ upper.mT, full_matrices=False)
        root, dtype = s[:most].sqrt(), delta.down.dtype
        down, up = root[:, None] * (right[:most] @ basis.mT), left[:, :most] * root
        layers[name] = LayerDelta(down.to(dtype), up.to(dtype), delta.kernel)
        total += float(s.square().sum())
        lost += float(s[most:].square().sum())
    return Adapter(layers, adapter.metadata), lost / total if total else 0.0
