"""Second moments of wide layers in little room: the largest eigenpairs, and the trace of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .linalg import leading_svd

ENERGY = 0.995  # share of the trace that the kept pairs hold at least, if MOST of them can
EPS = 1e-2  # ridge of the metric and of the closed form, in units of the mean eigenvalue
MOST = 128  # pairs
COLUMNS = 192  # of the random basis of a stream
EXACT = 2048  # inputs up to which all eigenpairs are computed; wider moments go through `leading_svd`


@dataclass
class Operator:
    """A symmetric matrix in little room, `floor I + V diag(weights) V^T`, or a stack of them.

    vectors V [..., d, k]; weights [..., k]; floor [...].
    """

    vectors: Tensor
    weights: Tensor
    floor: Tensor

    def __matmul__(self, x: Tensor) -> Tensor:
        """[..., d, r] -> [..., d, r]; one of m in a stack serves n / m in a row of the n in x"""
        if x.ndim > 2 and len(x) != len(self.vectors):
            n, d, r = x.shape
            m = len(self.vectors)
            side_by_side = x.view(m, n // m, d, r).transpose(1, 2).reshape(m, d, -1)
            return (self @ side_by_side).view(m, d, n // m, r).transpose(1, 2).reshape(n, d, r)
        low = self.weights.unsqueeze(-1) * (self.vectors.mT @ x)
        return self.floor[..., None, None] * x + self.vectors @ low

    def to(self, device) -> Operator:
        """The same on a device"""
        return Operator(self.vectors.to(device), self.weights.to(device), self.floor.to(device))

    @classmethod
    def identity(cls, d: int) -> Operator:
        """I [d, d]"""
        return cls(torch.zeros(d, 0), torch.zeros(0), torch.ones(()))

    @classmethod
    def stack(cls, parts: list[Operator]) -> Operator:
        """Of unequal k: the narrower ones are filled up with columns of weight zero"""
        widest = max(len(p.weights) for p in parts)
        room = [widest - len(p.weights) for p in parts]
        return cls(
            torch.stack([F.pad(p.vectors, (0, n)) for p, n in zip(parts, room)]),
            torch.stack([F.pad(p.weights, (0, n)) for p, n in zip(parts, room)]),
            torch.stack([p.floor for p in parts]),
        )


@dataclass
class Sketch:
    """`S ~ V diag(values) V^T + rest / (d - k) (I - V V^T)`: the trace of S is kept.

    vectors V [d, k] orthonormal; values [k], descending; rest: trace of S outside V's span.
    """

    vectors: Tensor
    values: Tensor
    rest: Tensor

    def __len__(self) -> int:
        """d, as of a matrix"""
        return len(self.vectors)

    def dense(self) -> Tensor:
        """[d, d]"""
        eye = torch.eye(len(self.vectors), dtype=self.vectors.dtype, device=self.vectors.device)
        return (self.vectors * (self.values - self.floor)) @ self.vectors.mT + self.floor * eye

    def operator(self) -> Operator:
        """The same matrix as one that multiplies without being formed"""
        return Operator(self.vectors, self.values - self.floor, self.floor)

    def whitening(self, eps: float) -> tuple[Operator, Operator]:
        """`ridge(S)^(-1/2)` and its inverse, as `linalg.whitening` gives them of a matrix; exact, since they bend V's span only"""
        more = eps * (self.values.sum() + self.rest) / len(self.vectors)
        roots = (self.values + more).double().sqrt()
        root = (self.floor + more).double().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        white = Operator(self.vectors, (1 / roots - 1 / root).float(), (1 / root).float())
        return white, Operator(self.vectors, (roots - root).float(), root.float())

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
        """Most by which `tr(A D S D^T A^T)` and that of a sketch made of S itself, or of a stream of its rows, can differ.

        `S - V diag(values) V^T` is positive (of a Nystrom approximation as of eigenpairs: Tropp et al. 2017) and has trace
        `rest`, so it lies between 0 and `rest I`; what the sketch has instead, `floor (I - V V^T)`, does so too.  Hence
        the difference of the two, as an operator, is at most `rest`.
        """
        change = ((up.mT @ up) * (down @ down.mT)).sum()
        return float(self.rest * change)


def sketch(moment: Tensor, energy: float | None = None, most: int = MOST) -> Sketch:
    """Fewest eigenpairs of S [d, d] that hold `energy` of its trace, at most `most`; with None those that `_cut` keeps.

    Wider than EXACT: about those, by `leading_svd`.
    """
    moment = moment.double()
    if moment.shape[0] <= EXACT:
        values, vectors = torch.linalg.eigh(moment)
        values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    else:
        vectors, values, _ = leading_svd(moment, most)
    return _cut(vectors, values.clamp_min(0), torch.diagonal(moment).sum(), energy)


def added(parts: list[Sketch], weights: list[float], energy: float | None = None, most: int = MOST) -> Sketch:
    """`sum_i w_i S_i` as a sketch, with the trace of the sum"""
    d = len(parts[0].vectors)
    factor = torch.cat([p.vectors * (w * (p.values - p.floor).clamp_min(0)).sqrt() for p, w in zip(parts, weights)], 1).double()
    floor = sum(w * p.floor.double() for p, w in zip(parts, weights))
    trace = sum(w * (p.values.sum() + p.rest).double() for p, w in zip(parts, weights))
    if not factor.any():  # all directions alike, as of inputs that are all zero: which one is kept is all the same
        return _cut(parts[0].vectors[:, :1].double(), floor.view(1), trace, energy)
    if factor.shape[1] <= min(d, EXACT):
        values, right = torch.linalg.eigh(factor.mT @ factor)
        values, right = values.clamp_min(0).flip(0)[:most], right.flip(1)[:, :most]
        kept = values > 1e-12 * values[0]
        values = values[kept]
        vectors = factor @ right[:, kept] / values.sqrt()
    elif d <= EXACT:
        values, vectors = torch.linalg.eigh(factor @ factor.mT)
        values, vectors = values.clamp_min(0).flip(0)[:most], vectors.flip(1)[:, :most]
    else:
        vectors, values, _ = leading_svd(factor, most)
        values = values.square()
    return _cut(vectors, values + floor, trace, energy)


def products(parts: list[Sketch]) -> Tensor:
    """V_i^T V_j of all their kept vectors side by side, [K, K] for K pairs in all, in float64"""
    ends = list(accumulate((len(p.values) for p in parts), initial=0))
    out = torch.empty(ends[-1], ends[-1], dtype=torch.float64, device=parts[0].vectors.device)
    for i, one in enumerate(parts):
        left, rows = one.vectors.double().mT, slice(ends[i], ends[i + 1])
        for j, other in enumerate(parts[: i + 1]):
            columns = slice(ends[j], ends[j + 1])
            block = left @ other.vectors.double()
            out[rows, columns], out[columns, rows] = block, block.mT
    return out


class RidgedInverse:
    """`ridge(sum_i w_i S_i, eps)^(-1)` by Woodbury's identity: never a matrix of d x d, nor a copy of all the vectors.

    With F the kept vectors times the roots of their weights, `(c I + F F^T)^(-1) = (I - F (c I + F^T F)^(-1) F^T) / c`.
    grams: `products` of the parts.  In float64.
    """

    def __init__(self, parts: list[Sketch], weights: list[float], grams: Tensor, eps: float):
        self.parts = parts
        above = [w * (p.values.double() - p.floor.double()) for p, w in zip(parts, weights)]
        self.roots = torch.cat(above).clamp_min(0).sqrt()
        inner = self.roots[:, None] * grams * self.roots
        floor = sum(w * p.floor.double() for p, w in zip(parts, weights))
        mean = floor + inner.diagonal().sum() / len(parts[0])
        self.floor = floor + (eps * mean).clamp_min(torch.finfo(torch.float64).tiny)
        inner.diagonal().add_(self.floor)
        self.factor = torch.linalg.cholesky(inner)

    def __matmul__(self, x: Tensor) -> Tensor:
        """[d, r] -> [d, r]"""
        roots = self.roots[:, None]
        low = roots * torch.cat([p.vectors.double().mT @ x for p in self.parts])
        low = roots * torch.cholesky_solve(low, self.factor)
        for part, share in zip(self.parts, low.split([len(p.values) for p in self.parts])):
            x = x - part.vectors.double() @ share
        return x / self.floor


def _cut(vectors: Tensor, values: Tensor, trace: Tensor, energy: float | None) -> Sketch:
    """The fewest of these pairs, descending, that hold `energy` of the trace; None: ENERGY of it, and all that stand out of the
    ridge, for one strong direction may hold nearly all while weak ones tell concepts apart."""
    count = int((values.cumsum(0) < (ENERGY if energy is None else energy) * trace).sum()) + 1
    if energy is None:
        count = max(count, int((values > EPS * trace / len(vectors)).sum()))
    count = min(len(values), count)
    values, vectors = values[:count], vectors[:, :count]
    return Sketch(vectors.float().contiguous(), values.float(), (trace - values.sum()).clamp_min(0).float())


class Stream:
    """Second moment of inputs too wide for a square matrix, summed up as `S Omega` for a fixed random basis Omega.

    Tropp, Yurtsever, Udell, Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from streaming data"
    (2017), algorithm 3: room for width x COLUMNS numbers instead of width squared.  device: of the inputs; the sums are in
    main memory.
    """

    def __init__(self, width: int, device=None):
        self.test = _test_basis(width, str(device or "cpu"))
        self.product = torch.zeros(self.test.shape, dtype=torch.float64)
        self.trace = torch.zeros((), dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """rows [tokens, width] in float32"""
        self.product += (rows.mT @ (rows @ self.test)).cpu()
        self.trace += rows.square().sum().cpu()

    def sketch(self, count: int, energy: float | None = None, most: int = MOST) -> Sketch:
        """Of the mean over `count` rows"""
        test, product = self.test.cpu().double(), self.product / count
        if not self.trace:  # of inputs that are all zero, whose one kept direction is any
            return _cut(test[:, :1], torch.zeros(1, dtype=torch.float64), self.trace / count, energy)
        shift = torch.finfo(torch.float32).eps * product.norm()
        shifted = product + shift * test
        inner = test.mT @ shifted
        root = torch.linalg.cholesky((inner + inner.mT) / 2)
        vectors, values, _ = torch.linalg.svd(
            torch.linalg.solve_triangular(root, shifted.mT, upper=False).mT, full_matrices=False
        )
        values = (values.square() - shift).clamp_min(0)
        return _cut(vectors[:, :most], values[:most], self.trace / count, energy)


@lru_cache(maxsize=8)
def _test_basis(width: int, device: str) -> Tensor:
    """The same for all streams of one width"""
    random = torch.randn(width, min(COLUMNS, width), generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(random)[0].to(device)
