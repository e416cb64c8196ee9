"""Every formula of subspaces, energies and projections against its plain definition, in float64."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from seqlora_core import subspace
from seqlora_core.adapter import Adapter, LayerDelta, concatenate
from seqlora_core.attach import Site
from seqlora_core.bilevel import Group, UpperLevel, mean_energy, whitened_energies
from seqlora_core.calibration import Calibration
from seqlora_core.composition import Wishes, closed_form, compose, gram_schmidt, norm_controlled, norm_shares, project
from seqlora_core.concept import Concept
from seqlora_core.config import TrainingConfig
from seqlora_core.errors import UserError
from seqlora_core.interference import (
    overlaps,
    residual_energy,
    sub_gaussian_bound,
    whitened_energy,
)
from seqlora_core.linalg import orthonormal_basis, ridge
from seqlora_core.start import _basis_and_up, others_moments, starting_groups
from seqlora_core.statistics import Moments

IN, OUT, R = 16, 12, 3


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(x):
    return x.mT @ x / len(x)


def anisotropic(seed, count=400):
    """Inputs with most of their energy in few directions, as layers see them"""
    return randn(seed, count, IN) @ (torch.diag(torch.logspace(0.5, -1.5, IN, dtype=torch.float64)) @ randn(99, IN, IN))


def delta(seed):
    return LayerDelta(randn(seed, R, IN), randn(seed + 50, OUT, R))


def test_residual_energy_is_the_mean_square_of_the_output():
    x, d = anisotropic(1), delta(1)
    plain = (x @ d.down.mT @ d.up.mT).square().sum(1).mean()
    assert torch.allclose(residual_energy(d.up, d.down, moment_of(x)), plain)


def test_energy_in_whitened_coordinates_is_the_same_and_plain_weight_decay_on_generic_input():
    g = moment_of(anisotropic(3))
    metric = subspace.Metric.of(g)
    basis, up, other = orthonormal_basis(randn(4, IN, R)), randn(5, OUT, R), moment_of(anisotropic(6))
    down = metric.down(basis)
    assert torch.allclose(whitened_energy(up, basis, metric.white @ other @ metric.white), residual_energy(up, down, other))
    # on inputs of the metric itself, the penalty is |A|^2
    assert torch.allclose(residual_energy(up, down, ridge(g, subspace.EPS)), up.square().sum())


def test_metric_makes_disjoint_bases_disjoint_in_what_the_layer_sees():
    g = moment_of(anisotropic(3))
    metric = subspace.Metric.of(g)
    both = orthonormal_basis(randn(4, IN, 2 * R))
    first, second = metric.down(both[:, :R]), metric.down(both[:, R:])
    assert (first @ ridge(g, subspace.EPS) @ second.mT).abs().max() < 1e-12
    assert (first @ second.mT).abs().max() > 1e-3  # and not in the plain sense
    assert torch.allclose(metric.basis(first), both[:, :R])


def test_data_driven_basis_maximises_the_generalised_quotient_in_the_free_space():
    g, s = moment_of(anisotropic(3)), moment_of(anisotropic(7))
    metric = subspace.Metric.of(g)
    taken = orthonormal_basis(randn(8, IN, 4))
    basis = subspace.data_driven_basis(s, metric, R, taken)
    assert (taken.mT @ basis).abs().max() < 1e-10
    seen = metric.white @ s @ metric.white
    best = torch.trace(basis.mT @ seen @ basis)
    for seed in range(20):
        rival = orthonormal_basis(randn(100 + seed, IN, R) - taken @ (taken.mT @ randn(100 + seed, IN, R)))
        assert torch.trace(rival.mT @ seen @ rival) <= best + 1e-9


def test_adaptive_rank_is_the_fewest_directions_that_hold_the_share():
    g, s = moment_of(anisotropic(3)), moment_of(anisotropic(7))
    metric = subspace.Metric.of(g)
    basis = subspace.data_driven_basis(s, metric, 4, None)
    energy = torch.diagonal(metric.down(basis) @ s @ metric.down(basis).mT)
    for share in (0.1, 0.5, 0.9, 1.0):
        count = subspace.enough(s, metric, basis, share)
        assert energy[:count].sum() >= share * energy.sum() * (1 - 1e-9)
        assert count == 1 or energy[: count - 1].sum() < share * energy.sum()


def test_rank_limit():
    assert subspace.rank_limit(320, 101, 4) == 3
    assert subspace.rank_limit(192, 32, 4) == 4
    assert subspace.rank_limit(64, 32, 4) == 1  # not 2, of 1.9
    assert subspace.rank_limit(64, 101, 4) == 1


@pytest.mark.parametrize("count", [1, 3, 5, 6, 8])
def test_occupied_basis_always_leaves_room(count):
    bases = [orthonormal_basis(randn(i, IN, R)) for i in range(count)]
    taken, shared = subspace.occupied_basis(bases, [randn(100 + i, OUT, R) for i in range(count)], R)
    assert taken.shape[1] + R <= IN
    assert torch.allclose(taken.mT @ taken, torch.eye(taken.shape[1], dtype=torch.float64), atol=1e-10)
    if count * R + R <= IN:
        assert shared is None
        for basis in bases:
            assert torch.allclose(taken @ (taken.mT @ basis), basis, atol=1e-10)
    else:
        assert shared.shape[1] == min(IN, count * R) + R - IN
        assert torch.allclose(taken.mT @ shared, torch.zeros(1, dtype=torch.float64), atol=1e-10)


def test_a_full_layer_shares_what_is_used_least():
    """Of 64 disjoint concepts of rank 1 the weakest gives up its direction, whole, and no other is touched."""
    frame = orthonormal_basis(randn(1, 64, 64))
    bases, ups = list(frame.split(1, dim=1)), [randn(2 + i, OUT, 1) for i in range(64)]
    weakest = min(range(64), key=lambda i: ups[i].norm())
    taken, shared = subspace.occupied_basis(bases, ups, 1)
    assert (bases[weakest].mT @ shared).abs() > 1 - 1e-9
    assert (taken.mT @ bases[weakest]).abs().max() < 1e-9


def test_of_a_concept_the_least_used_of_its_directions_is_shared():
    first, second = orthonormal_basis(randn(1, IN, IN)).split([IN - R, R], dim=1)
    weak = torch.linalg.svd(randn(3, OUT, R) * 0.1, full_matrices=False)
    taken, shared = subspace.occupied_basis([first, second], [randn(2, 2 * IN, IN - R), weak.U * weak.S @ weak.Vh], 1)
    assert (shared.mT @ (second @ weak.Vh[-1])).abs() > 1 - 1e-9


def test_a_refitted_concept_shares_by_what_it_does_whatever_its_factors_lengths():
    """Of a refit lora_down is no orthonormal basis any more: the weak one's is short and its lora_up long"""
    general = moment_of(anisotropic(3))
    frame, metric, earlier = orthonormal_basis(randn(1, IN, IN)), subspace.Metric.of(general), []
    for name, columns, down, up in (("weak", slice(0, 8), 1e-3, 10.0), ("strong", slice(8, 16), 1e2, 0.1)):
        delta = LayerDelta((down * metric.down(frame[:, columns])).float(), (up * randn(2, OUT, 8)).float())
        basis = orthonormal_basis(metric.basis(delta.down.double())).float()
        earlier.append(Concept(name, "", "", Adapter({"l": delta}), None, {"l": basis}, torch.zeros(0), []))
    site = Site("l", (torch.nn.Linear(IN, OUT),), IN, OUT)
    model = SimpleNamespace(device=torch.device("cpu"), sites=lambda: [site])
    moments = Moments({"l": general.float()})
    config = TrainingConfig(rank=4, planned=2)
    _, notes = starting_groups(model, moments, moments, earlier, Calibration(moments, [], torch.zeros(0)), config, None)
    assert "l is full: the 4 least used directions of earlier concepts are shared, of weak" in notes


def test_lora_up_on_the_basis_says_what_a_refitted_concept_does():
    """Whose lora_down is its basis in other lengths and another order"""
    metric, basis = subspace.Metric.of(moment_of(anisotropic(3))), orthonormal_basis(randn(4, IN, R))
    change = LayerDelta(randn(5, R, R) @ metric.down(basis), randn(6, OUT, R))
    concept = Concept("one", "", "", Adapter({"l": change}), None, {"l": basis}, torch.zeros(0), [])
    assert torch.allclose(_basis_and_up(concept, "l", metric)[1] @ metric.down(basis), change.dense())


def test_a_concept_of_another_metric_holds_what_its_lora_down_is_in_this_one():
    """Such as one trained without whitening, beside one with it"""
    metric, basis = subspace.Metric.of(moment_of(anisotropic(3))), orthonormal_basis(randn(4, IN, R))
    change = LayerDelta(basis.mT, randn(6, OUT, R))
    held, up = _basis_and_up(
        Concept("one", "", "", Adapter({"l": change}), None, {"l": basis}, torch.zeros(0), []), "l", metric
    )
    assert torch.allclose(held.mT @ held, torch.eye(R).to(held)) and torch.allclose(up @ metric.down(held), change.dense())


def test_sum_is_concatenation():
    a, b = Adapter({"l": delta(1)}), Adapter({"l": delta(2), "m": delta(3)})
    total = compose([a, b], [0.5, -2.0])
    dense = 0.5 * a.layers["l"].dense() - 2 * b.layers["l"].dense()
    assert torch.allclose(total.layers["l"].dense(), dense)
    assert torch.allclose(total.layers["m"].dense(), -2 * b.layers["m"].dense())
    assert total.layers["l"].rank == 2 * R


def test_delta_energy_is_the_frobenius_norm():
    assert torch.allclose(delta(1).energy(), delta(1).dense().square().sum())


def test_closed_form_minimises_its_objective():
    """Perturbing the projected lora_down in any direction raises the stated objective."""
    adapters = [Adapter({"l": delta(i)}) for i in range(3)]
    moments = [Moments({"l": moment_of(anisotropic(10 + i))}) for i in range(3)]
    projected = closed_form(adapters, moments, beta=0.7)[1].layers["l"]
    own, others = moments[1]["l"], moments[0]["l"] + moments[2]["l"]
    system = own + 0.7 * others
    extra = ridge(system, 1e-2) - system

    def objective(down):
        change = down - adapters[1].layers["l"].down
        up = adapters[1].layers["l"].up
        return residual_energy(up, change, own) + 0.7 * residual_energy(up, down, others) + residual_energy(up, down, extra)

    best = objective(projected.down)
    for seed in range(10):
        assert objective(projected.down + 1e-3 * randn(seed, R, IN)) > best


def test_closed_form_does_not_depend_on_the_order():
    adapters = [Adapter({"l": delta(i)}) for i in range(3)]
    moments = [Moments({"l": moment_of(anisotropic(10 + i))}) for i in range(3)]
    forward = closed_form(adapters, moments)
    backward = closed_form(adapters[::-1], moments[::-1])
    assert torch.allclose(forward[0].layers["l"].down, backward[2].layers["l"].down)


def test_gram_schmidt_leaves_the_first_whole_and_rows_orthogonal():
    adapters = [Adapter({"l": delta(i)}) for i in range(3)]
    out = gram_schmidt(adapters)
    assert torch.equal(out[0].layers["l"].down, adapters[0].layers["l"].down)
    for i in range(3):
        for j in range(i):
            assert (out[i].layers["l"].down @ out[j].layers["l"].down.mT).abs().max() < 1e-10


def test_gram_schmidt_beyond_the_layers_width_goes_to_zero():
    out = gram_schmidt([Adapter({"l": delta(i)}) for i in range(8)])
    assert out[7].layers["l"].down.abs().max() < 1e-9


def test_amount_goes_from_sum_to_projection():
    adapters = [Adapter({"l": delta(i)}) for i in range(2)]
    none, full = compose(adapters, mode="weights", amount=0.0), compose(adapters, mode="weights")
    half = compose(adapters, mode="weights", amount=0.5)
    assert torch.allclose(none.layers["l"].dense(), concatenate(adapters).layers["l"].dense())
    assert torch.allclose(half.layers["l"].dense(), 0.5 * (none.layers["l"].dense() + full.layers["l"].dense()))


def test_norm_control_keeps_the_energy_of_unrelated_adapters():
    adapters = norm_controlled([Adapter({"l": delta(i)}) for i in range(4)])
    assert torch.allclose(adapters[0].layers["l"].up, delta(0).up / 2)


@pytest.mark.parametrize("amount", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("wishes", [Wishes(), Wishes(restore=True), Wishes("first"), Wishes(protected=frozenset({1}))])
def test_norm_control_divides_once_whatever_else_is_asked_for(wishes, amount):
    """Of adapters that read directions of their own each, in which the projection leaves all but its division; in layers that
    one alone has too, and in mode data in those that nobody recorded"""
    apart = torch.linalg.qr(randn(3, IN, 4 * R))[0].mT.split(R)[: IN // R]
    adapters = [Adapter({n: LayerDelta(down, randn(i, OUT, R)) for n in ("l", f"only {i}")}) for i, down in enumerate(apart)]
    wishes = replace(wishes, undivided=True)
    for mode in ("sum", "weights", *(["data"] if wishes.order == "symmetric" else [])):
        shares = norm_shares(len(adapters), wishes.protected)
        projected = project(adapters, mode, amount, [Moments() for _ in adapters], wishes=wishes)
        for i, (before, after, share) in enumerate(zip(adapters, projected, shares)):
            root = 1.0 if i in wishes.protected else (len(adapters) - len(wishes.protected)) ** -0.5
            for n, d in after.layers.items():
                assert torch.allclose(share * d.dense(), root * before.layers[n].dense(), atol=1e-6), (mode, i, n)


def test_a_protected_adapter_is_left_whole_by_the_cap_too():
    wild = Adapter({n: delta(i) for i, n in enumerate("lmn")})
    wild.layers["l"] = LayerDelta(wild.layers["l"].down * 100, wild.layers["l"].up)
    cut, kept = (project([wild], wishes=Wishes(cap=1.0, protected=p))[0] for p in (frozenset(), frozenset({0})))
    assert kept is wild and not torch.allclose(cut.layers["l"].dense(), wild.layers["l"].dense())


def test_compose_refuses_nonsense():
    with pytest.raises(UserError, match="unknown mode"):
        compose([Adapter({"l": delta(1)})], mode="magic")
    with pytest.raises(UserError, match="nothing to stack"):
        compose([])
    with pytest.raises(UserError, match="needs the moments"):
        compose([Adapter({"l": delta(1)})], mode="data")
    pair = [Adapter({"l": delta(i)}) for i in range(2)]
    with pytest.raises(UserError, match="3 strengths for 2 adapters"):
        compose(pair, [1.0] * 3)
    with pytest.raises(UserError, match="moments of 1 adapters for 2"):
        compose(pair, mode="data", moments=[Moments({"l": torch.eye(IN)})])


def test_overlap_is_a_multiple_of_chance():
    shared = overlaps([LayerDelta(randn(i, R, 200), randn(i, OUT, R)) for i in range(10)])
    assert 0.7 < shared[~torch.eye(10, dtype=torch.bool)].mean() < 1.3
    assert torch.allclose(shared.diagonal(), torch.full((10,), 200 / R, dtype=torch.float64))


@pytest.mark.parametrize("delta_", [0.5, 0.1, 0.01])
def test_bound_holds_with_the_promised_frequency_and_is_not_loose(delta_):
    """On Gaussian inputs; and the bound is at most three times the quantile that it bounds"""
    d = delta(1)
    g = moment_of(anisotropic(3))
    root = torch.linalg.cholesky(ridge(g, 1e-9))
    x = randn(77, 20_000, IN) @ root.mT
    norms = (x @ d.down.mT @ d.up.mT).norm(dim=1)
    bound = sub_gaussian_bound(d.up, d.down, root @ root.mT, delta_)
    assert (norms > bound).double().mean() <= delta_
    assert bound < 3 * norms.quantile(1 - delta_)


def test_bound_of_rank_one_is_the_scalar_one():
    """|a| |u x| with E (u x)^2 = e: e (1 + 2 sqrt(t) + 2 t)"""
    up, down, moment = randn(1, OUT, 1), randn(2, 1, IN), moment_of(anisotropic(3))
    e, t = residual_energy(up, down, moment).item(), math.log(20)
    assert math.isclose(sub_gaussian_bound(up, down, moment, 0.05), math.sqrt(e * (1 + 2 * math.sqrt(t) + 2 * t)), rel_tol=1e-9)


def test_the_bound_of_a_change_of_less_rank_than_columns():
    up = (randn(1, OUT, 1) @ randn(2, 1, R)).float()
    for seed in range(20):
        assert math.isfinite(sub_gaussian_bound(up, randn(seed, R, IN).float(), moment_of(anisotropic(seed)).float()))


def make_group(seed=0, layers=3, taken_columns=4):
    taken = orthonormal_basis(randn(seed, layers, IN, taken_columns))
    basis = orthonormal_basis(randn(seed + 1, layers, IN, R) - taken @ (taken.mT @ randn(seed + 1, layers, IN, R)))
    metrics = [subspace.Metric.of(moment_of(anisotropic(seed + i))) for i in range(layers)]
    white = torch.stack([m.white for m in metrics])
    moment = torch.stack([m.white @ moment_of(anisotropic(30 + i)) @ m.white for i, m in enumerate(metrics)])
    up = randn(seed + 2, layers, OUT, R).requires_grad_()
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    return Group([f"l{i}" for i in range(layers)], up, basis.requires_grad_(), white, moment, scale, taken)


def test_stacked_energies_equal_layer_by_layer_ones():
    group = make_group()
    plain = [whitened_energy(u, b, m) for u, b, m in zip(group.up, group.basis, group.moment)]
    assert torch.allclose(whitened_energies(group), torch.stack(plain))
    assert torch.allclose(mean_energy([group]), sum(e * s for e, s in zip(plain, group.scale)) / 3)


@pytest.mark.parametrize("how", ["qr", "polar"])
def test_a_thousand_upper_steps_stay_orthonormal_and_disjoint(how):
    group = make_group()
    level = UpperLevel([group], 2e-2, how)
    target = randn(9, 3, IN, R)
    first = None
    for _ in range(1000):
        group.basis.grad = None
        objective = (group.basis - target).square().sum()
        first = first if first is not None else objective.item()
        objective.backward()
        level.step()
    b = group.basis.detach()
    assert (b.mT @ b - torch.eye(R, dtype=torch.float64)).abs().max() < 1e-6
    assert (group.occupied.mT @ b).abs().max() < 1e-6
    assert objective.item() < first


def test_a_step_of_the_upper_level_is_riemannian_adam():
    """Three steps against the formulas written out: tangent gradient, its moments without their bias, the step made tangent,
    QR, and the first moment carried to the new tangent space"""
    group, rate, b1, b2 = make_group(), 3e-2, 0.9, 0.99
    level = UpperLevel([group], rate)
    basis, first, second = group.basis.detach().clone(), 0.0, 0.0
    free = torch.eye(IN, dtype=torch.float64) - group.occupied @ group.occupied.mT

    def tangent(at, g):
        inner = at.mT @ free @ g
        return free @ g - at @ (inner + inner.mT) / 2

    for t in (1, 2, 3):
        group.basis.grad = randn(20 + t, *basis.shape)
        level.step()
        g = tangent(basis, group.basis.grad)
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
        step = (first / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + 1e-8)
        basis = orthonormal_basis(basis - rate * tangent(basis, step))
        first = tangent(basis, first)
        assert torch.allclose(group.basis.detach(), basis, atol=1e-12)


@pytest.mark.parametrize("protection", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("use_decoys", [True, False])
def test_what_a_concept_leaves_alone_is_generic_inputs_decoys_and_the_mean_of_earlier_ones(protection, use_decoys):
    general, decoy, *seen = (Moments({"l": moment_of(anisotropic(i))}) for i in range(5))
    earlier = [Concept(str(i), "", "", Adapter({}), s, {}, torch.zeros(0), []) for i, s in enumerate(seen)]
    found = others_moments(general, decoy if use_decoys else None, earlier, TrainingConfig(protection=protection))
    everything_else = (general["l"] + decoy["l"]) / 2 if use_decoys else general["l"]
    assert torch.allclose(found["l"], everything_else + protection * sum(s["l"] for s in seen) / 3)


def test_the_upper_level_finds_the_minimum_on_the_manifold():
    """max tr(B^T M B): the optimum is the top eigenvectors of M within the free space."""
    group = make_group(layers=3)
    level = UpperLevel([group], 1e-2)
    m = randn(11, 3, IN, IN)
    m = m @ m.mT
    for step in range(1500):
        level.rate = 1e-2 * (1 - step / 1500)
        group.basis.grad = None
        objective = -(group.basis * (m @ group.basis)).sum()
        objective.backward()
        level.step()
    free = torch.eye(IN, dtype=torch.float64) - group.occupied @ group.occupied.mT
    best = -torch.linalg.eigvalsh(free @ m @ free)[:, -R:].sum()
    assert torch.allclose(objective, best, rtol=1e-4)
    assert level.gradient_norm() < 1e-2 * m.norm()
