"""Sketches of second moments: what they keep, what they miss, and the bound on it."""

import pytest
import torch

from seqlora_core import sketch as module
from seqlora_core import statistics
from seqlora_core.attach import Attachment
from seqlora_core.interference import residual_energy
from seqlora_core.sketch import Sketch, Stream, sketch
from seqlora_core.statistics import Moments, Recorder, moments_from_tensors


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


def test_the_fewest_pairs_that_hold_the_energy():
    moment = torch.diag(torch.tensor([90.0, 8.0, 1.5, 0.5]))
    made = sketch(moment, 0.95, 4)
    assert made.values.tolist() == [90.0, 8.0] and made.missed == pytest.approx(0.02)
    assert sketch(moment, 1.0, 4).missed == pytest.approx(0.0, abs=1e-6)
    assert len(sketch(moment, 0.9999, 1).values) == 1


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


def test_the_recorder_streams_inputs_that_are_too_wide(monkeypatch):
    monkeypatch.setattr(statistics, "EXACT", 16)
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
