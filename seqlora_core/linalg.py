"""Small dense linear algebra on batches of matrices: bases, projections, the Stiefel manifold.

Conventions: a basis is a matrix with orthonormal columns, `[..., d, r]`.  All functions are pure, keep the
dtype and device of their input, and accept leading batch dimensions where they say `[...]`.
Formulas: Absil, Mahony, Sepulchre, "Optimization Algorithms on Matrix Manifolds" (2008), sections 3.6 and 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

RETRACTIONS = ("qr", "polar")
UNFACTORED = ("mps",)  # devices on which torch has no QR and no singular values: such small ones are quick in main memory


def sym(matrix: Tensor) -> Tensor:
    """Symmetric part of `[..., n, n]`."""
    return 0.5 * (matrix + matrix.mT)


def orthonormal_basis(matrix: Tensor) -> Tensor:
    """Orthonormal basis of the column space of `[..., d, r]`, by QR with a positive diagonal of R.

    The sign convention makes it continuous in its input (it is the identity on a basis).
    """
    q, r = torch.linalg.qr(_where_factored(matrix))
    sign = torch.where(torch.diagonal(r, dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return (q * sign.unsqueeze(-2)).to(matrix.device)


def _where_factored(matrix: Tensor) -> Tensor:
    return matrix.cpu() if matrix.device.type in UNFACTORED else matrix


def span(matrix: Tensor, scale: float, eps: float = 1e-5) -> Tensor:
    """Orthonormal basis of what the columns of `[d, r]` span, without directions below eps x scale: maybe fewer than r."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, s > eps * scale]


def acting_directions(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal input directions [..., in, r] of changes `up @ down` and the energy of each [..., r], in float64.

    The right singular vectors, from r x r products.  Rows of lora_down that are zero, that depend on others or that lora_up
    does not use make directions that are any and have no energy.
    """
    basis, upper = torch.linalg.qr(down.double().mT)
    up = up.double() @ upper.mT
    energies, vectors = torch.linalg.eigh(up.mT @ up)
    beyond_rounding = energies > 1e-12 * energies.amax(-1, keepdim=True)
    return basis @ vectors, energies.where(beyond_rounding, 0.0)


def nearest_frame(matrix: Tensor, eps: float = 1e-10) -> Tensor:
    """Polar factor of `[d, r]`: the orthonormal columns that are nearest to its own, all treated alike (Löwdin 1950).

    Columns that depend on each other share their directions, with less than unit length each.  In float64.
    """
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = s > eps * s.max()
    return (u[:, kept] @ vh[kept]).to(matrix.dtype)


def project_out(matrix: Tensor, occupied: Tensor | None) -> Tensor:
    """Component of the columns of `[..., d, r]` orthogonal to the basis `occupied` `[..., d, k]`.

    Done twice ("twice is enough", Giraud and Langou 2005), so that the result is orthogonal to machine precision.
    """
    if occupied is None or occupied.shape[-1] == 0:
        return matrix
    for _ in range(2):
        matrix = matrix - occupied @ (occupied.mT @ matrix)
    return matrix


def tangent(basis: Tensor, gradient: Tensor, occupied: Tensor | None = None) -> Tensor:
    """Riemannian gradient at `basis`: the Euclidean gradient projected to the tangent space of the Stiefel
    manifold (embedded metric) and off the directions that are taken.

    basis, gradient `[..., d, r]`; occupied `[..., d, k]`, orthogonal to basis.  The result T satisfies
    B^T T + T^T B = 0 and occupied^T T = 0.
    """
    gradient = project_out(gradient, occupied)
    return gradient - basis @ sym(basis.mT @ gradient)


def retract(basis: Tensor, step: Tensor, occupied: Tensor | None = None, how: str = "qr") -> Tensor:
    """Point of the Stiefel manifold reached from `basis` along `step` `[..., d, r]`, off `occupied`.

    how: "qr" (first order) or "polar" (second order: the closest basis to B + step); ValueError for another.
    """
    moved = project_out(basis + step, occupied)
    if how == "qr":
        return orthonormal_basis(moved)
    if how == "polar":
        u, _, vh = torch.linalg.svd(_where_factored(moved), full_matrices=False)
        return (u @ vh).to(moved.device)
    raise ValueError(f"unknown retraction {how!r}: use 'qr' or 'polar'")


def ridge(moment: Tensor, eps: float) -> Tensor:
    """`S + eps tr(S)/d I`: a second moment `[..., d, d]` made safely invertible, independent of its scale."""
    d = moment.shape[-1]
    mean = torch.diagonal(moment, dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(d, dtype=moment.dtype, device=moment.device)
    # of inputs that are all zero too the inverse root is a number of float32
    return moment + (eps * mean).clamp_min(torch.finfo(torch.float32).tiny)[..., None, None] * eye


def whitening(moment: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`W = ridge(S)^(-1/2)` and its inverse, both symmetric `[..., d, d]`, computed in float64.

    With y = W x and E[x x^T] = ridge(S), E[y y^T] = I: lengths and angles in y are those the layer sees.
    """
    values, vectors = torch.linalg.eigh(ridge(moment.double(), eps))
    root = values.sqrt().unsqueeze(-2)
    return ((vectors / root) @ vectors.mT).to(moment.dtype), ((vectors * root) @ vectors.mT).to(moment.dtype)


def top_eigenvectors(matrix: Tensor, count: int) -> Tensor:
    """Orthonormal eigenvectors `[..., d, count]` of the largest eigenvalues of a symmetric matrix, in float64."""
    vectors = torch.linalg.eigh(sym(matrix.double()))[1][..., -count:].flip(-1)
    # eigenvectors have no sign of their own: fix it, so that two runs start from the same point
    peak = vectors.abs().argmax(-2, keepdim=True)
    return (vectors * vectors.gather(-2, peak).sign()).to(matrix.dtype)


def leading_svd(matrix: Tensor, count: int, rounds: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """About the largest singular values `[count]` of a matrix [m, n], descending, with their vectors [m, count] and [n, count]:
    Halko, Martinsson, Tropp (2011), by torch.svd_lowrank, the same in every run.  rounds: of the power iteration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, q=count, niter=rounds)
