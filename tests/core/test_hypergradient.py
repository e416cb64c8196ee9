"""The hypergradient where everything is known: a quadratic lower level, whose minimiser has a closed form."""

import pytest
import torch

from seqlora_core.bilevel import Group, UpperLevel
from seqlora_core.errors import UserError
from seqlora_core.hypergradient import conjugate_gradient, hypergradient, neumann, parse
from seqlora_core.linalg import orthonormal_basis, retract, tangent

IN, OUT, R, COUNT, LAMBDA = 9, 5, 2, 40, 0.3


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Quadratic:
    """A layer that should map x to y: L(A, B; x, y) = |A B^T x - y|^2 / n + lambda |A|^2, as in METHOD.md."""

    def __init__(self):
        self.support = (randn(1, IN, COUNT), randn(2, OUT, COUNT))
        self.query = (randn(3, IN, COUNT), randn(4, OUT, COUNT))

    def lower(self, up, basis):
        return self._error(up, basis, *self.support) + LAMBDA * up.square().sum()

    def upper(self, up, basis):
        return self._error(up, basis, *self.query) + LAMBDA * up.square().sum()

    @staticmethod
    def _error(up, basis, x, y):
        return (up @ basis.mT @ x - y).square().sum() / COUNT

    def best_up(self, basis):
        """argmin_A of the lower level: ridge regression on the projected inputs"""
        x, y = self.support
        low = basis.mT @ x
        return torch.linalg.solve(low @ low.mT / COUNT + LAMBDA * torch.eye(R, dtype=x.dtype), low @ y.mT / COUNT).mT

    def value(self, basis):
        """F(A*(B), B)"""
        return self.upper(self.best_up(basis), basis)

    def gradient(self, basis, how):
        up, basis = self.best_up(basis).requires_grad_(), basis.clone().requires_grad_()
        value, (gradient,) = hypergradient(lambda: self.upper(up, basis), lambda: self.lower(up, basis), [up], [basis], how)
        return value, gradient


def finite_differences(function, at, step=1e-5):
    out = torch.zeros(at.shape, dtype=at.dtype)
    for i in range(at.numel()):
        move = torch.zeros(at.numel(), dtype=at.dtype)
        move[i] = step
        move = move.reshape(at.shape)
        out.view(-1)[i] = (function(at + move) - function(at - move)) / (2 * step)
    return out


@pytest.fixture
def problem():
    return Quadratic()


@pytest.mark.parametrize("how", ["cg:10", "neumann:400"])
def test_equals_finite_differences_of_the_inner_minimum(problem, how):
    basis = orthonormal_basis(randn(5, IN, R))
    _, gradient = problem.gradient(basis, how)
    wanted = finite_differences(problem.value, basis)
    assert (gradient - wanted).abs().max() < 1e-6
    assert wanted.abs().max() > 1e-2


def test_first_order_leaves_out_how_the_inner_level_follows(problem):
    basis = orthonormal_basis(randn(5, IN, R))
    _, gradient = problem.gradient(basis, "none")
    up = problem.best_up(basis)
    assert (gradient - finite_differences(lambda b: problem.upper(up, b), basis)).abs().max() < 1e-6
    assert (gradient - finite_differences(problem.value, basis)).abs().max() > 1e-3


@pytest.mark.parametrize("solve", [conjugate_gradient, neumann])
def test_more_terms_come_closer(solve):
    root = randn(6, 12, 12)
    matrix = root @ root.mT + 0.5 * torch.eye(12, dtype=torch.float64)
    target = [randn(7, 12)]
    exact = torch.linalg.solve(matrix, target[0])
    errors = [(solve(lambda v: [matrix @ v[0]], target, k)[0] - exact).norm() for k in (1, 4, 12)]
    assert errors[0] > errors[1] > errors[2]


def test_conjugate_gradient_is_exact_after_as_many_steps_as_dimensions():
    root = randn(6, 6, 6)
    matrix = root @ root.mT + 0.5 * torch.eye(6, dtype=torch.float64)
    target = randn(7, 6)
    x = conjugate_gradient(lambda v: [matrix @ v[0]], [target], 6)[0]
    assert torch.allclose(matrix @ x, target, atol=1e-9)


def test_conjugate_gradient_stops_at_negative_curvature():
    matrix = torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64))
    x = conjugate_gradient(lambda v: [matrix @ v[0]], [torch.ones(2, dtype=torch.float64)], 5)[0]
    assert torch.equal(x, torch.zeros_like(x))  # the first direction curves down already


def test_neumann_finds_an_eigenvalue_that_the_target_hides():
    matrix = torch.diag(torch.tensor([100.0, 1.0, 0.5], dtype=torch.float64))
    target = torch.tensor([1e-9, 1.0, 1.0], dtype=torch.float64)
    x = neumann(lambda v: [matrix @ v[0]], [target], 2000)[0]
    assert (matrix @ x - target).abs().max() < 1e-4


def test_neumann_ends_where_its_terms_grow():
    matrix = torch.diag(torch.tensor([1.0, 0.5, -0.5], dtype=torch.float64))
    target = torch.ones(3, dtype=torch.float64)
    assert neumann(lambda v: [matrix @ v[0]], [target], 30)[0].norm() < 10 * target.norm()


@pytest.mark.parametrize("solve", [conjugate_gradient, neumann])
def test_zero_is_solved_by_zero(solve):
    assert torch.equal(solve(lambda v: v, [torch.zeros(3)], 4)[0], torch.zeros(3))


@pytest.mark.parametrize("how", ["cg", "cg:0", "neumann:-1", "newton:3", "", "cg:x"])
def test_nonsense_is_refused(how):
    with pytest.raises(UserError, match="hypergradient is"):
        parse(how)


@pytest.mark.parametrize("how", ["qr", "polar"])
def test_line_search_never_raises_the_upper_objective_and_reaches_a_stationary_point(problem, how):
    taken = orthonormal_basis(randn(8, IN, 3))
    basis = retract(orthonormal_basis(randn(9, IN, R)), torch.zeros(IN, R, dtype=torch.float64), taken)
    group = Group(["layer"], problem.best_up(basis)[None], basis[None].clone(), *[None] * 3, taken[None])
    upper, values = UpperLevel([group], 1.0, how), [problem.value(basis).item()]
    for _ in range(150):
        group.basis.grad = problem.gradient(group.basis[0], "cg:10")[1][None]
        upper.search(lambda: problem.value(group.basis[0]).item())
        values.append(problem.value(group.basis[0]).item())
    basis = group.basis[0]
    assert all(b <= a for a, b in zip(values, values[1:]))
    assert values[-1] < values[0] - 1e-3
    _, gradient = problem.gradient(basis, "cg:10")
    assert tangent(basis, gradient, taken).norm() < 1e-5
    assert (basis.mT @ basis - torch.eye(R, dtype=torch.float64)).abs().max() < 1e-12
    assert (taken.mT @ basis).abs().max() < 1e-12
