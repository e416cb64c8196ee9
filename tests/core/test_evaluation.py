"""What a table's row says of losses that are known."""

import pytest
import torch

from seqlora_core import evaluation
from seqlora_core.calibration import Calibration
from seqlora_core.concept import References
from seqlora_core.config import TrainingConfig
from seqlora_core.evaluation import REPEATS, HeldOut, Losses, held_out_loss, measure, row
from seqlora_core.replay import Replay
from seqlora_core.statistics import Moments

from ..reliability.toy import ToyDenoiser


def test_a_row_of_known_losses():
    losses = Losses([0.5, 0.6], [0.6, 0.4], [[0.5, 0.7], [0.5]], 1.1, 0.4)
    found = row("ours", losses, [1.0, 1.0], [0.5, 0.0], 1.0)
    assert (found["n"], found["counted"], found["pairs"]) == (2, 2, 0.4)
    assert found["alone_gain"] == pytest.approx(0.9 / 1.5) and found["generic_drift"] == pytest.approx(0.1)
    assert found["stack_gain"] == pytest.approx(1.0 / 1.5)
    assert found["kept_mean"] == pytest.approx((0.8 + 0.6) / 2) and found["kept_worst"] == pytest.approx(0.6)
    assert found["kept_subset"] == pytest.approx((1.0 + 0.6 + 0.5) / 3)


def test_a_concept_without_a_gain_has_nothing_to_keep():
    """The second one's ordinary LoRA is hardly better than the bare model: any share of that would drown all others"""
    losses = Losses([0.5, 0.99], [0.5, 1.5], [[0.5], [1.5]], 1.0, None)
    found = row("ours", losses, [1.0, 1.0], [0.5, 0.96], 1.0)
    assert (found["counted"], found["kept_mean"], found["kept_worst"], found["kept_subset"]) == (1, 1.0, 1.0, 1.0)
    assert row("short", losses, [1.0, 1.0], [0.99, 0.99], 1.0)["counted"] == 2


def test_who_is_on_when_each_loss_is_measured(monkeypatch):
    """A stack that names its members, a loss that is a number of its own for each (pictures, what is on)"""
    number = {}
    monkeypatch.setattr(evaluation, "held_out_loss", lambda _, seen, on: number.setdefault((seen, on), len(number) + 1.0))
    concepts, alone = list("abcde"), [f"{c} alone" for c in "abcde"]
    found = measure(None, alone, tuple, concepts, "generic", [(0, 2, "a and c"), (1, 4, "b and e")], subsets=3)
    everything = (0, 1, 2, 3, 4)
    assert found.alone == [number[c, a] for c, a in zip(concepts, alone)]
    assert found.stack == [number[c, everything] for c in concepts] and found.generic == number["generic", everything]
    assert found.pairs == (number["a and c", (0, 2)] + number["b and e", (1, 4)]) / 2
    said = {value: key for key, value in number.items()}
    assert len(found.subset) == 3
    for i, drawn in enumerate(found.subset):
        assert len(drawn) == 3 and all(said[d][0] == concepts[i] for d in drawn)
        beside = [set(said[d][1]) - {i} for d in drawn]
        assert all(len(b) == 2 and i in said[d][1] for b, d in zip(beside, drawn))
    assert len({key for key in number if len(key[1]) == 3 and key[0] in concepts}) > 4  # others each time


def test_every_held_out_picture_is_seen_at_every_level_with_its_caption_and_noise_of_its_own():
    model, captions = ToyDenoiser(), ["a fox", "an owl", "a house", "a tree"]
    seen = HeldOut.of(model, torch.arange(4.0).view(4, 1, 1, 1).expand(4, 4, 2, 2), captions, levels=6)
    pictures, levels = seen.latents[:, 0, 0, 0], [round(float(s), 4) for s in model.even_sigmas(6)]
    found = sorted(zip(pictures.tolist(), (round(float(s), 4) for s in seen.sigma)))
    assert found == sorted((float(p), s) for p in range(4) for s in levels for _ in range(REPEATS))
    assert torch.equal(seen.conditioning.context, model.encode_prompts(captions)[pictures.long()].context)
    assert len(seen.noise.unique(dim=0)) == len(found)


@pytest.mark.parametrize("side, most", [(8, 96), (64, 12)])
def test_large_pictures_go_through_the_model_a_few_at_a_time(side, most):
    """Where a fit begins as little room must do as for its steps, and for what measures it afterwards"""
    model, asked = ToyDenoiser(), []
    predict = model.predict
    model.predict = lambda *inputs: asked.append(len(inputs[0])) or predict(*inputs)
    latents, captions = torch.randn(40, 4, side, side, generator=torch.Generator().manual_seed(0)), ["a fox"] * 40
    seen = HeldOut.of(model, latents, captions, levels=2)
    found, whole = (
        held_out_loss(model, seen),
        predict(model.noised(seen.latents, seen.noise, seen.sigma), seen.sigma, seen.conditioning),
    )
    assert found == pytest.approx(float((whole - model.target(seen.latents, seen.noise, seen.sigma)).square().mean()), rel=1e-4)
    assert max(asked) == most and sum(asked) == 160
    asked.clear()
    of = References(latents[:2], captions[:2], (8 * side, 8 * side))
    Replay(model, of, "octzu", [], Calibration(Moments(), captions, latents), TrainingConfig(use_decoys=False)).base_loss()
    assert max(asked) == most // 3
