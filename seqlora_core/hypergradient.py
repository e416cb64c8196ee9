"""How the upper objective moves with the basis when lora_up follows it.

With A*(B) the minimiser of the lower objective L(., B), and F the upper one (implicit function theorem):

    dF/dB = d_B F - d2_BA L (d2_AA L + damping I)^(-1) d_A F

Ghadimi and Wang, "Approximation Methods for Bilevel Programming" (2018); the two inverses as in Pedregosa (2016,
conjugate gradient) and Lorraine, Vicol, Duvenaud (2020, Neumann series).  Only Hessian-vector products are formed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import UserError

Vector = list[Tensor]  # one tensor for each factor
Product = Callable[[Vector], Vector]
POWER_STEPS = 10  # of the power iteration that finds the Neumann series' step


def parse(how: str) -> tuple[str, int]:
    """ "none", "neumann:5", "cg:10" -> (kind, terms); UserError otherwise."""
    kind, _, count = how.partition(":")
    if how == "none":
        return "none", 0
    if kind in ("neumann", "cg") and count.isdigit() and int(count) > 0:
        return kind, int(count)
    raise UserError(f"hypergradient is {how!r}: use 'none', 'neumann:K' or 'cg:K' with K terms, such as 'cg:5'")


def hypergradient(
    upper: Callable[[], Tensor], lower: Callable[[], Tensor], inner: Vector, outer: Vector, how: str = "none",
    damping: float = 0.0,
) -> tuple[Tensor, Vector]:  # fmt: skip
    """Value of F, and its gradient in `outer` with `inner` following.

    upper, lower: compute F and L from the leaves `inner` (A) and `outer` (B), twice differentiable.  "none" is the
    direct part alone.  damping is added to the lower Hessian, which a network need not keep positive.
    """
    kind, terms = parse(how)
    value = upper()
    gradients = torch.autograd.grad(value, [*outer, *inner])
    direct, wanted = list(gradients[: len(outer)]), list(gradients[len(outer) :])
    if kind == "none":
        return value.detach(), direct
    slope = torch.autograd.grad(lower(), inner, create_graph=True)

    def hessian(v: Vector) -> Vector:
        product = torch.autograd.grad(slope, inner, v, retain_graph=True)
        return [p + damping * x for p, x in zip(product, v)]

    solved = (conjugate_gradient if kind == "cg" else neumann)(hessian, wanted, terms)
    followed = torch.autograd.grad(slope, outer, solved)
    return value.detach(), [d - f for d, f in zip(direct, followed)]


def conjugate_gradient(product: Product, target: Vector, steps: int) -> Vector:
    """Approximate solution of H x = target, H symmetric positive definite; exact after as many steps as dimensions.

    Stops early where H is found not to be positive along the search: a network's Hessian need not be.
    """
    x = [torch.zeros_like(t) for t in target]
    residual = [t.clone() for t in target]
    direction, rest = residual, dot(residual, residual)
    tiny = rest * torch.finfo(rest.dtype).eps ** 2
    for _ in range(steps):
        if rest <= tiny:
            break
        curved = product(direction)
        curvature = dot(direction, curved)
        if curvature <= 0:
            break
        length = rest / curvature
        x = [a + length * d for a, d in zip(x, direction)]
        residual = [r - length * c for r, c in zip(residual, curved)]
        rest, before = dot(residual, residual), rest
        direction = [r + rest / before * d for r, d in zip(residual, direction)]
    return x


def neumann(product: Product, target: Vector, terms: int) -> Vector:
    """`eta sum_{j <= terms} (I - eta H)^j target`, which tends to H^(-1) target for 0 < eta < 2 / |H|.

    eta = 1 / (the largest eigenvalue that a short power iteration finds, from the target and something random, so that no
    direction is missed).  The terms of a positive H shrink; where they grow, H is not positive or larger than was found, and
    the series ends before it.
    """
    size = dot(target, target).sqrt()
    if size == 0:
        return [torch.zeros_like(t) for t in target]
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t) for t in target]
    scale = size / dot(random, random).sqrt()
    probe, largest = [t + scale * r for t, r in zip(target, random)], torch.zeros_like(size)
    for _ in range(POWER_STEPS):
        length = dot(probe, probe).sqrt()
        if length == 0:
            break
        probe = product([p / length for p in probe])
        largest = torch.maximum(largest, dot(probe, probe).sqrt())
    if largest == 0:
        return [torch.zeros_like(t) for t in target]
    term, total, before = target, target, size
    for _ in range(terms):
        term = [t - p / largest for t, p in zip(term, product(term))]
        after = dot(term, term).sqrt()
        if after > before:
            break
        total, before = [a + t for a, t in zip(total, term)], after
    return [t / largest for t in total]


def dot(first: Vector, second: Vector) -> Tensor:
    """Sum over all factors of their inner products; scalar"""
    return sum((a * b).sum() for a, b in zip(first, second))
