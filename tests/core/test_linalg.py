"""Contract of the linear algebra, in float64."""

import pytest
import torch

from seqlora_core import linalg

D, R, K = 20, 4, 5


@pytest.fixture(params=[0, 1, 2])
def rng(request):
    return torch.Generator().manual_seed(request.param)


def randn(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def orthonormal(basis):
    return torch.allclose(
        basis.mT @ basis, torch.eye(basis.shape[-1], dtype=basis.dtype).expand(*basis.shape[:-2], -1, -1), atol=1e-12
    )


def test_orthonormal_basis_spans_and_is_identity_on_bases(rng):
    m = randn(rng, 3, D, R)
    q = linalg.orthonormal_basis(m)
    assert orthonormal(q)
    assert torch.allclose(q @ (q.mT @ m), m, atol=1e-12)
    assert torch.allclose(linalg.orthonormal_basis(q), q, atol=1e-12)


def test_project_out_is_idempotent_and_orthogonal(rng):
    taken = linalg.orthonormal_basis(randn(rng, D, K))
    m = randn(rng, D, R)
    out = linalg.project_out(m, taken)
    assert (taken.mT @ out).abs().max() < 1e-14
    assert torch.allclose(linalg.project_out(out, taken), out, atol=1e-14)
    assert linalg.project_out(m, None) is m


def test_tangent_is_tangent_and_off_the_taken_space(rng):
    taken = linalg.orthonormal_basis(randn(rng, D, K))
    basis = linalg.orthonormal_basis(linalg.project_out(randn(rng, D, R), taken))
    t = linalg.tangent(basis, randn(rng, D, R), taken)
    assert (basis.mT @ t + t.mT @ basis).abs().max() < 1e-12
    assert (taken.mT @ t).abs().max() < 1e-12


def test_tangent_is_the_steepest_direction(rng):
    """The projection of G to the tangent space: <T, X> = <G, X> for every tangent X."""
    basis, g = linalg.orthonormal_basis(randn(rng, D, R)), randn(rng, D, R)
    x = linalg.tangent(basis, randn(rng, D, R))
    assert torch.allclose((linalg.tangent(basis, g) * x).sum(), (g * x).sum(), atol=1e-10)


@pytest.mark.parametrize("how", ["qr", "polar"])
def test_retraction_stays_on_the_manifold_and_is_first_order(rng, how):
    taken = linalg.orthonormal_basis(randn(rng, D, K))
    basis = linalg.orthonormal_basis(linalg.project_out(randn(rng, D, R), taken))
    t = linalg.tangent(basis, randn(rng, D, R), taken)
    errors = []
    for size in (1e-2, 1e-3):
        moved = linalg.retract(basis, size * t, taken, how)
        assert orthonormal(moved)
        assert (taken.mT @ moved).abs().max() < 1e-12
        errors.append((moved - basis - size * t).norm().item())
    # the error of a retraction is of second order in the step
    assert errors[1] < errors[0] / 50


@pytest.mark.parametrize("how, power", [("qr", 2), ("polar", 3)])
def test_polar_is_a_retraction_of_second_order_and_qr_of_first(rng, how, power):
    """Of second order: its acceleration is normal to the manifold, so the tangent part of its error falls with the cube"""
    basis = linalg.orthonormal_basis(randn(rng, D, R))
    t = linalg.tangent(basis, randn(rng, D, R))
    sizes = (1e-2, 1e-3)
    errors = [linalg.tangent(basis, linalg.retract(basis, s * t, None, how) - basis - s * t).norm().item() for s in sizes]
    assert errors[0] / errors[1] == pytest.approx(10**power, rel=0.1)


def test_unknown_retraction_is_refused(rng):
    basis = linalg.orthonormal_basis(randn(rng, D, R))
    with pytest.raises(ValueError, match="unknown retraction"):
        linalg.retract(basis, basis, how="cayley")


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_whitening_makes_the_metric_the_identity(rng, scale):
    x = randn(rng, 200, D) * torch.logspace(0, -3, D, dtype=torch.float64)
    moment = scale * x.mT @ x / 200
    w, w_inv = linalg.whitening(moment, 1e-2)
    assert torch.allclose(w @ linalg.ridge(moment, 1e-2) @ w, torch.eye(D, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(w @ w_inv, torch.eye(D, dtype=torch.float64), atol=1e-9)


def test_whitening_of_inputs_that_are_all_zero_is_finite():
    for part in linalg.whitening(torch.zeros(8, 8), 1e-2):
        assert part.isfinite().all()


def test_top_eigenvectors_have_a_sign_of_their_own(rng):
    m = randn(rng, D, D)
    m = m @ m.mT
    v = linalg.top_eigenvectors(m, R)
    values = torch.linalg.eigvalsh(m)[-R:].flip(0)
    assert torch.allclose(v.mT @ m @ v, torch.diag(values), atol=1e-8)
    assert (v.gather(0, v.abs().argmax(0, keepdim=True)) > 0).all()
