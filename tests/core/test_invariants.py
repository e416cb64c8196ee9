"""Invariants of the mathematics, over random shapes and sizes, in float64 and in the types in use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqlora_core import linalg, subspace
from seqlora_core.adapter import Adapter, LayerDelta, concatenate
from seqlora_core.composition import Wishes, closed_form, compose, gram_schmidt, norm_controlled
from seqlora_core.interference import residual_energy
from seqlora_core.low_rank import truncated
from seqlora_core.spectrum import capped
from seqlora_core.statistics import Moments

# type -> share of error that its rounding may leave
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
HALF = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(6, 40), st.integers(6, 40), st.integers(1, 5))  # in, out, rank
scales = st.floats(1e-3, 1e3)
often = settings(max_examples=25, deadline=None)
both = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def randn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def adapters(seed, shape, count, dtype=torch.float64):
    width, out, rank = shape
    return [
        Adapter({n: LayerDelta(randn(seed + 9 * i + k, rank, width, dtype=dtype), randn(seed + 9 * i + k + 5, out, rank, dtype=dtype)) for k, n in enumerate("lm")})
        for i in range(count)
    ]  # fmt: skip


def moments(seed, width, count):
    """Anisotropic, as layers see them"""
    tilt = torch.diag(torch.logspace(0.5, -1.5, width, dtype=torch.float64))
    out = []
    for i in range(count):
        x = randn(seed + 31 * i, 3 * width, width) @ tilt
        out.append(Moments({n: x.mT @ x / len(x) for n in "lm"}))
    return out


def near(a, b, dtype, scale=None):
    scale = max(float(b.double().abs().max()), 1e-12) if scale is None else scale
    return float((a.double() - b.double()).abs().max()) <= TOLERANCE.get(dtype, HALF.get(dtype)) * scale


@both
@often
@given(seed=seeds, shape=shapes, scale=scales)
def test_bases_are_orthonormal_and_projections_idempotent(dtype, seed, shape, scale):
    width, _, rank = shape
    basis = linalg.orthonormal_basis(scale * randn(seed, width, rank, dtype=dtype))
    assert near(basis.mT @ basis, torch.eye(rank), dtype)
    m = randn(seed + 1, width, rank, dtype=dtype)
    once = linalg.project_out(m, basis)
    assert near(linalg.project_out(once, basis), once, dtype, 10) and near(basis.mT @ once, torch.zeros(1), dtype, 10)
    tangent = linalg.tangent(basis, m)
    assert near(linalg.tangent(basis, tangent), tangent, dtype, 10)


@both
@pytest.mark.parametrize("how", ["qr", "polar"])
@often
@given(seed=seeds, shape=shapes, step=st.floats(1e-4, 1.0))
def test_a_retraction_stays_orthonormal_and_off_the_taken_space(dtype, how, seed, shape, step):
    width, _, rank = shape
    taken = linalg.orthonormal_basis(randn(seed, width, max(1, width - 2 * rank) if width > 2 * rank else 1, dtype=dtype))
    if taken.shape[1] + rank > width:
        return
    basis = linalg.orthonormal_basis(linalg.project_out(randn(seed + 1, width, rank, dtype=dtype), taken))
    moved = linalg.retract(basis, step * linalg.tangent(basis, randn(seed + 2, width, rank, dtype=dtype), taken), taken, how)
    assert near(moved.mT @ moved, torch.eye(rank), dtype, 10) and near(taken.mT @ moved, torch.zeros(1), dtype, 10)


@both
@often
@given(seed=seeds, shape=shapes, scale=scales)
def test_disjoint_bases_are_disjoint_in_the_metric_at_every_scale_of_it(dtype, seed, shape, scale):
    width, _, rank = shape
    if 2 * rank > width:
        return
    g = scale * moments(seed, width, 1)[0]["l"].to(dtype)
    metric = subspace.Metric.of(g)
    basis = linalg.orthonormal_basis(randn(seed, width, 2 * rank, dtype=dtype))
    first, second = metric.down(basis[:, :rank]), metric.down(basis[:, rank:])
    assert near(first @ linalg.ridge(g, subspace.EPS) @ second.mT, torch.zeros(1), dtype, 10)


@pytest.mark.parametrize("dtype", [*TOLERANCE, *HALF], ids=str)
@often
@given(seed=seeds, shape=shapes, strengths=st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_the_sum_is_the_concatenation_in_any_order(dtype, seed, shape, strengths):
    parts = adapters(seed, shape, 3, dtype)
    plain = sum(s * p.layers["l"].up.double() @ p.layers["l"].down.double() for s, p in zip(strengths, parts))
    forward, backward = compose(parts, strengths), compose(parts[::-1], strengths[::-1])
    size = 10 * shape[2]
    for together in (forward, backward):
        delta = together.layers["l"]
        assert near(delta.up.double() @ delta.down.double(), plain, dtype, size)
    assert forward.layers["l"].rank == 3 * shape[2]


@both
@often
@given(seed=seeds, shape=shapes, order=st.permutations(range(3)))
def test_the_closed_form_does_not_depend_on_the_order(dtype, seed, shape, order):
    parts, seen = adapters(seed, shape, 3, dtype), moments(seed, shape[0], 3)
    one = closed_form(parts, seen)
    other = closed_form([parts[i] for i in order], [seen[i] for i in order])
    for place, i in enumerate(order):
        assert near(other[place].layers["m"].down, one[i].layers["m"].down, dtype)


@both
@often
@given(seed=seeds, shape=shapes, scale=scales)
def test_the_closed_form_does_not_depend_on_the_scale_of_what_is_seen(dtype, seed, shape, scale):
    parts, seen = adapters(seed, shape, 2, dtype), moments(seed, shape[0], 2)
    scaled = [Moments({n: scale * m for n, m in s.layers.items()}) for s in seen]
    assert near(closed_form(parts, scaled)[0].layers["l"].down, closed_form(parts, seen)[0].layers["l"].down, dtype)


@both
@often
@given(seed=seeds, shape=shapes, scale=scales)
def test_projections_follow_the_scale_of_the_adapters(dtype, seed, shape, scale):
    """Linear in lora_up and in lora_down: scaling one adapter scales its own projection and changes no other's."""
    parts, seen = adapters(seed, shape, 2, dtype), moments(seed, shape[0], 2)
    louder = [parts[0].scaled(scale), parts[1]]
    for project in (lambda a: closed_form(a, seen), gram_schmidt, norm_controlled):
        before, after = project(parts), project(louder)
        assert near(after[0].layers["l"].dense(), scale * before[0].layers["l"].dense(), dtype)
        assert near(after[1].layers["l"].dense(), before[1].layers["l"].dense(), dtype)


@both
@often
@given(seed=seeds, shape=shapes)
def test_energies_are_positive_and_quadratic(dtype, seed, shape):
    delta, seen = adapters(seed, shape, 1, dtype)[0].layers["l"], moments(seed, shape[0], 1)[0]["l"].to(dtype)
    energy = residual_energy(delta.up, delta.down, seen)
    assert energy >= 0
    assert near(residual_energy(3 * delta.up, delta.down, seen), 9 * energy, dtype)
    assert near(residual_energy(delta.up, delta.down, 2 * seen), 2 * energy, dtype)
    # the same change written in another basis of its r directions
    turn = linalg.orthonormal_basis(randn(seed + 3, shape[2], shape[2], dtype=dtype))
    assert near(residual_energy(delta.up @ turn.mT, turn @ delta.down, seen), energy, dtype)


@both
@often
@given(seed=seeds, shape=shapes)
def test_exact_truncation_and_the_cap_are_idempotent(dtype, seed, shape):
    wide = concatenate(adapters(seed, shape, 9, dtype))
    exact, lost = truncated(wide)
    assert lost < 1e-9 and near(exact.layers["l"].dense(), wide.layers["l"].dense(), dtype)
    once = capped(wide, 1.0)
    assert near(capped(once, 1.0).layers["l"].dense(), once.layers["l"].dense(), torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    "mode, order", [("weights", "symmetric"), ("weights", "first"), ("weights", "strongest"), ("data", "symmetric")]
)
def test_projections_of_half_precision_are_those_of_whole(dtype, mode, order):
    shape = (24, 16, 4)
    parts, seen = adapters(3, shape, 3, dtype), moments(3, shape[0], 3)
    whole = [Adapter({n: LayerDelta(d.down.float(), d.up.float()) for n, d in p.layers.items()}) for p in parts]
    found, wanted = (compose(some, mode=mode, moments=seen, wishes=Wishes(order)).layers["m"] for some in (parts, whole))
    assert found.down.dtype == dtype
    assert near(found.up.double() @ found.down.double(), wanted.dense(), dtype, 4 * float(wanted.dense().abs().max()))
