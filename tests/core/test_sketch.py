"""Sketches of second moments: what they keep, what they miss, and the bound on it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqlora_core import linalg, statistics, trainer
from seqlora_core import sketch as module
from seqlora_core.adapter import Adapter, LayerDelta, channel_rows, kernel_rows
from seqlora_core.attach import Attachment
from seqlora_core.calibration import Calibration
from seqlora_core.composition import closed_form
from seqlora_core.concept import Concept
from seqlora_core.config import TrainingConfig
from seqlora_core.demo import load_subject
from seqlora_core.interference import residual_energy
from seqlora_core.sketch import Operator, Sketch, Stream, added, sketch
from seqlora_core.statistics import Moments, Recorder, moments_from_tensors
from seqlora_core.subspace import EPS, Metric, data_driven_basis
from seqlora_core.trainer import fit


def anisotropic(seed, d, decay=2.0):
    """A second moment whose eigenvalues fall as a power"""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    return (basis * torch.arange(1, d + 1, dtype=torch.float64) ** -decay) @ basis.mT


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("exact", [True, False])
def test_energies_differ_by_at_most_the_bound(monkeypatch, decay, exact):
    if not exact:
        monkeypatch.setattr(module, "EXACT", 10)
    moment = anisotropic(0, 96, decay)
    made = sketch(moment, 0.9, 20)
    assert torch.allclose(made.vectors.mT @ made.vectors, torch.eye(made.vectors.shape[1]), atol=1e-5)
    assert torch.allclose(torch.trace(made.dense()), torch.trace(moment).float(), rtol=1e-5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        up, down = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((7, 3), (3, 96)))
        difference = residual_energy(up, down, moment) - residual_energy(up, down, made.dense().double())
        assert abs(difference) <= made.error_bound(up.float(), down.float()) * 1.01


@pytest.mark.parametrize("decay", [0.25, 0.5, 1.0, 1.5])
def test_energies_of_a_stream_differ_by_at_most_the_bound(decay):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(1500, 300, generator=generator) * torch.arange(1, 301) ** (-decay / 2)
    moment, stream = (rows.double().mT @ rows.double()) / len(rows), Stream(300)
    stream.add(rows)
    made = stream.sketch(len(rows))
    widest = torch.linalg.eigh(moment - made.dense().double())[1].mT  # directions in which the two differ, most at the ends
    for row in (widest[:1], widest[-1:], *torch.randn(20, 3, 300, generator=generator, dtype=torch.float64)):
        up = torch.randn(7, len(row), generator=generator, dtype=torch.float64)
        difference = residual_energy(up, row, moment) - residual_energy(up, row, made.dense().double())
        assert abs(difference) <= made.error_bound(up.float(), row.float()) * 1.01


def test_the_fewest_pairs_that_hold_the_energy():
    moment = torch.diag(torch.tensor([90.0, 8.0, 1.5, 0.5]))
    made = sketch(moment, 0.95, 4)
    assert made.values.tolist() == [90.0, 8.0] and made.missed == pytest.approx(0.02)
    assert sketch(moment, 1.0, 4).missed == pytest.approx(0.0, abs=1e-6)
    assert len(sketch(moment, 0.9999, 1).values) == 1


@pytest.mark.parametrize("strongest", [0.98, 0.996])
@pytest.mark.parametrize("streamed", [True, False])
def test_directions_that_tell_concepts_apart_are_kept_beside_one_that_outdoes_them_all(strongest, streamed):
    """Two concepts of inputs that differ in weak directions only, forty each: projected by sketches as by their matrices"""
    d, generator = 600, torch.Generator().manual_seed(4)
    axes = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    parts, dense, kept = [], [], []
    for i in range(2):
        spread = torch.zeros(d)
        spread[0], spread[1 + 40 * i : 41 + 40 * i] = strongest, (1 - strongest) / 40
        rows = torch.randn(4000, d, generator=generator) * spread.sqrt() @ axes.mT
        dense.append(rows.mT @ rows / len(rows))
        stream = Stream(d)
        stream.add(rows)
        kept.append(stream.sketch(len(rows)) if streamed else sketch(dense[-1]))
        parts.append(Adapter({"l": LayerDelta(torch.randn(4, d, generator=generator), torch.randn(5, 4, generator=generator))}))
    assert all(41 <= len(s.values) <= 128 for s in kept)
    found, wanted = (closed_form(parts, [Moments({"l": m}) for m in some]) for some in (kept, dense))
    for f, w in zip(found, wanted):
        assert (f.layers["l"].down - w.layers["l"].down).norm() < 0.02 * w.layers["l"].down.norm()
    both = added(kept, [0.5, 0.5])
    assert (both.dense() - sum(dense) / 2).norm() < 1e-3 * dense[0].norm() and len(both.values) >= 81


def test_wide_layers_are_written_as_sketches_and_read_back():
    wide, narrow = anisotropic(2, 700).float(), anisotropic(3, 8).float()
    moments = Moments({"q": wide, "k": wide, "small": narrow})
    tensors = moments.tensors()
    assert set(tensors) == {"sketch.q.vectors", "sketch.q.values", "sketch.q.rest", "moment.small"}
    assert sum(t.numel() for t in tensors.values()) < 0.2 * wide.numel()
    back = moments_from_tensors(tensors, moments.shared())
    assert isinstance(back.layers["q"], Sketch) and back.layers["q"] is back.layers["k"]
    assert (back["k"] - wide).norm() < 0.01 * wide.norm() and torch.equal(back["small"], narrow)
    assert set(back.tensors()) == set(tensors)  # written again as it is
    both = back.plus(moments, 2.0)
    assert torch.allclose(both["q"], back["q"] + 2 * wide)


@pytest.mark.parametrize("decay", [0.5, 1.5])
def test_a_stream_finds_what_the_whole_moment_has(decay):
    """Against the best approximation of its rank; and the trace is exact"""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(900, 600, generator=generator) * torch.arange(1, 601) ** (-decay / 2)
    stream = Stream(600)
    for part in rows.split(250):
        stream.add(part)
    made, moment = stream.sketch(len(rows), 0.9, 40), rows.mT @ rows / len(rows)
    best = sketch(moment, 0.9, 40)
    assert torch.allclose(torch.trace(made.dense()), torch.trace(moment), rtol=1e-4)
    assert (made.dense() - moment).norm() < 1.2 * (best.dense() - moment).norm()
    assert torch.allclose(made.vectors.mT @ made.vectors, torch.eye(made.vectors.shape[1]), atol=1e-5)


def test_a_stream_of_nothing_but_zeros_is_a_sketch_of_nothing():
    stream = Stream(600)
    stream.add(torch.zeros(20, 600))
    found = stream.sketch(20)
    assert found.values.tolist() == [0.0] and found.rest == 0 and found.vectors.isfinite().all()


@pytest.mark.parametrize("weights", [[0.5, 0.5], [2.0, 0.1]])
def test_energies_on_a_sum_of_sketches_differ_by_at_most_the_sum_of_the_bounds(weights):
    generator = torch.Generator().manual_seed(5)
    moments = [torch.cov(torch.randn(64, 400, generator=generator, dtype=torch.float64)) for _ in weights]
    parts = [sketch(m, 0.5, 20) for m in moments]
    made = added(parts, weights, 0.9, 30).dense().double()
    cut = torch.linalg.matrix_norm(made - sum(w * p.dense().double() for w, p in zip(weights, parts)), 2)
    bound, total = sum(w * p.rest.double() for w, p in zip(weights, parts)) + cut, sum(w * m for w, m in zip(weights, moments))
    for row in (*torch.linalg.eigh(total - made)[1].mT[[0, -1], None], *torch.randn(20, 3, 64, generator=generator).double()):
        up = torch.randn(7, len(row), generator=generator, dtype=torch.float64)
        difference = residual_energy(up, row, total) - residual_energy(up, row, made)
        assert abs(difference) <= bound * (up @ row).square().sum() * 1.01


def test_a_sum_of_sketches_in_which_all_directions_are_alike():
    """Of inputs that are all zero, as of a branch that this model leaves unused; and of noise"""
    nothing, noise = Stream(600), sketch(3 * torch.eye(600))
    nothing.add(torch.zeros(20, 600))
    nothing = nothing.sketch(20)
    for parts in ([nothing, nothing], [noise, noise], [nothing, noise], [added([noise, noise], [1.0, 0.5]), noise]):
        total = added(parts, [1.0, 0.5])
        assert len(total.values) and torch.allclose(total.dense(), parts[0].dense() + 0.5 * parts[1].dense(), atol=1e-5)


def test_the_recorder_streams_inputs_that_are_too_wide(monkeypatch):
    monkeypatch.setattr(statistics, "SKETCH_FROM", 16)
    rows, attachment = torch.randn(400, 24, generator=torch.Generator().manual_seed(1)), Attachment()
    with Recorder(attachment) as recorder:
        for part in rows.split(100):
            recorder.next_pass()
            attachment.record("wide", part)
            attachment.record("narrow", part[:, :4].contiguous())
    moments = recorder.moments()
    assert isinstance(moments.layers["wide"], Sketch) and moments.layers["narrow"].shape == (4, 4)
    exact = rows.mT @ rows / len(rows)
    assert (moments["wide"] - exact).norm() < 0.05 * exact.norm()


def low(seed, d, k=12):
    """A sketch, and the matrix it stands for"""
    made = sketch(anisotropic(seed, d), 1.0, k)
    return made, made.dense()


def test_operators_are_their_matrices():
    (a, dense_a), (b, dense_b) = low(0, 40), low(1, 40, 7)
    stack, x = Operator.stack([a.operator(), b.operator()]), torch.randn(6, 40, 3, generator=torch.Generator().manual_seed(0))
    matrices = torch.stack([dense_a] * 3 + [dense_b] * 3)  # each serves three layers in a row
    assert torch.allclose(stack @ x, matrices @ x, atol=1e-6)
    assert torch.allclose(Operator.identity(40) @ x[0], x[0])
    for ours, theirs in zip(a.whitening(1e-2), linalg.whitening(dense_a, 1e-2)):
        assert (ours @ torch.eye(40) - theirs).norm() < 1e-5 * theirs.norm()


def dense_closed_form(parts, seen, general, beta):
    """The formula on the matrices that the sketches stand for, in float64"""
    matrices = [linalg.sym(torch.linalg.multi_dot([s.vectors.double(), torch.diag(s.values.double() - s.floor), s.vectors.double().mT]))
                + s.floor.double() * torch.eye(len(s)) for s in [*seen, *general]]  # fmt: skip
    total, found = sum(matrices), []
    for part, own in zip(parts, matrices):
        inverse = torch.linalg.inv(linalg.ridge(own + beta * (total - own), 1e-2))
        rows = channel_rows(part.down, len(own))
        found.append(kernel_rows(rows @ own @ inverse, part.rank))
    return found


@pytest.mark.parametrize("beta", [1.0, 0.7])
@pytest.mark.parametrize("kernel", [(), (2, 2)])
@pytest.mark.parametrize("general", [0, 1])
def test_the_closed_form_of_sketches_is_that_of_their_matrices_in_little_room(monkeypatch, beta, kernel, general):
    generator, d = torch.Generator().manual_seed(3), 160
    parts = [
        LayerDelta(torch.randn(4, d * (4 if kernel else 1), generator=generator, dtype=torch.float64), torch.ones(5, 4), kernel)
        for _ in range(3)
    ]
    seen = [low(seed, d, 12 + seed)[0] for seed in range(3 + general)]
    moments, base = [Moments({"l": s}) for s in seen[:3]], Moments({"l": seen[3]}) if general else None
    wanted = dense_closed_form(parts, seen[:3], seen[3:], beta)
    monkeypatch.setattr(Sketch, "dense", None)
    with Largest() as largest:
        found = closed_form([Adapter({"l": p}) for p in parts], moments, base, beta, {1})
    assert largest.numbers <= max(p.down.numel() for p in parts) + d * 15  # nothing of d x d
    for i in (0, 2):
        assert (found[i].layers["l"].down - wanted[i]).norm() < 1e-6 * wanted[i].norm()
    assert found[1].layers["l"] is parts[1]


def test_the_closed_form_of_more_pairs_than_inputs():
    """And of a layer that one LoRA alone has, whose inputs the others' moments know as well"""
    parts = [LayerDelta(torch.randn(2, 24, dtype=torch.float64), torch.ones(5, 2)) for _ in range(2)]
    seen = [low(seed, 24, 12)[0] for seed in range(3)]
    wanted = dense_closed_form(parts, seen[:2], seen[2:], 1.0)
    moments, base = [Moments({"l": s}) for s in seen[:2]], Moments({"l": seen[2]})
    for others in ({"l": parts[1]}, {}):
        found = closed_form([Adapter({"l": parts[0]}), Adapter(others)], moments, base)
        assert (found[0].layers["l"].down - wanted[0]).norm() < 1e-5 * wanted[0].norm()


def test_the_closed_form_of_moments_that_are_kept_as_one_pair():
    """Of inputs that are all zero, or of one channel that outdoes all others"""
    rows, nothing = torch.randn(200, 768, generator=torch.Generator().manual_seed(0)), Stream(768)
    nothing.add(torch.zeros(20, 768))
    rows[:, 5] *= 1e6
    massive = Stream(768)
    massive.add(rows)
    seen = [nothing.sketch(20), massive.sketch(200)]
    assert len(seen[0].values) == len(seen[1].values) == 1
    parts = [Adapter({"l": LayerDelta(torch.randn(2, 768), torch.ones(5, 2))}) for _ in seen]
    found = closed_form(parts, [Moments({"l": s}) for s in seen])
    assert all(a.layers["l"].down.isfinite().all() for a in found)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made meanwhile"""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        self.numbers = max([self.numbers, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))])
        return made


@pytest.mark.parametrize("exact", [2048, 30])
@pytest.mark.parametrize("count", [2, 5])
def test_a_sum_of_sketches_is_a_sketch_of_the_sum(monkeypatch, exact, count):
    monkeypatch.setattr(module, "EXACT", exact)
    parts, dense = zip(*(low(i, 40) for i in range(count)))
    weights = [1.0, 0.5, 0.25, 2.0, 1.0][:count]
    total = sum(w * m for w, m in zip(weights, dense))
    made, best = added(list(parts), weights, 0.99, 20), sketch(total, 0.99, 20)
    assert torch.allclose(torch.trace(made.dense()), torch.trace(total), rtol=1e-5)
    assert torch.allclose(made.vectors.mT @ made.vectors, torch.eye(len(made.values)), atol=1e-4)
    assert (made.dense() - total).norm() < 1.05 * (best.dense() - total).norm() + 1e-5 * total.norm()


@pytest.mark.parametrize("held", [0, 5, 36])
def test_a_start_from_sketches_is_the_start_from_their_matrices(held):
    (general, dense), (own, dense_own) = low(0, 40), low(1, 40)
    taken = torch.linalg.qr(torch.randn(40, held, generator=torch.Generator().manual_seed(2)))[0] if held else None
    ours = data_driven_basis(own, Metric.of(general), 4, taken)
    theirs = data_driven_basis(dense_own, Metric.of(dense), 4, taken)
    assert torch.allclose(ours.mT @ ours, torch.eye(4), atol=1e-5)
    assert taken is None or (taken.mT @ ours).abs().max() < 1e-5
    cosines = torch.linalg.svdvals(ours.double().mT @ theirs.double())  # of the principal angles
    assert cosines.min() > 1 - 1e-6


def test_a_fit_holds_no_square_matrix_of_layers_with_sketches(monkeypatch, model, calibration):
    """And is the fit that holds them, as far as the sketches are the moments"""
    references = load_subject(model, "octopus").references
    config = TrainingConfig(steps=4, batch=4, replay_batch=6, planned=4)
    whole = fit(model, references, "octzu", [], calibration, config)
    monkeypatch.setattr(statistics, "SKETCH_FROM", 100)
    known = Calibration(moments_from_tensors(calibration.moments.tensors(), calibration.moments.shared()), calibration.prompts, calibration.latents, visited=calibration.visited)  # fmt: skip
    assert all(isinstance(m, Sketch) for m in known.moments.layers.values())
    seen, starting_groups = [], trainer.starting_groups

    def watched(*args):
        groups, notes = starting_groups(*args)
        seen.extend(groups)
        return groups, notes

    monkeypatch.setattr(trainer, "starting_groups", watched)
    first = fit(model, references, "octzu", [], known, config)
    most = max(m.missed for m in known.moments.layers.values())
    assert f"at most {most:.1%} of it lies outside them" in " ".join(first.notes) and "outside" not in " ".join(whole.notes)
    assert all(t.shape[-2:] != (192, 192) for g in seen for o in (g.white, g.moment) for t in vars(o).values())
    assert torch.allclose(torch.tensor(first.losses), torch.tensor(whole.losses), rtol=0.02)
    assert torch.allclose(torch.tensor(first.energies[1:]), torch.tensor(whole.energies[1:]), rtol=0.2)
    concept = Concept("octopus", "octzu", "octopus", first.adapter, first.moments, first.bases, references.latents[:2], references.captions[:2])  # fmt: skip
    second = fit(model, load_subject(model, "penguin").references, "pengvo", [concept], known, config)
    for name, delta in second.adapter.layers.items():
        before, metric = first.adapter.layers[name].down, known.moments[name]
        crossed = delta.down @ linalg.ridge(metric, EPS) @ before.mT
        assert crossed.abs().max() < 1e-4, name
