"""The budget: dual ascent holds a constraint whatever its scale, and replay measures what it should."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from seqlora_core.adapter import Adapter, LayerDelta, concatenate
from seqlora_core.attach import Attachment, attached
from seqlora_core.budget import SAFETY, Budget
from seqlora_core.calibration import WATCHED
from seqlora_core.config import TrainingConfig
from seqlora_core.evaluation import held_out_loss
from seqlora_core.prompts import is_decoy
from seqlora_core.replay import Replay

from ..conftest import few_generic
from .conftest import teach


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("concepts, planned", [(1, 8), (8, 8), (20, 8)])
def test_dual_ascent_holds_the_constraint_on_a_problem_that_is_known(scale, concepts, planned):
    """min (a - 1)^2 + w c a^2 has a = 1 / (1 + w c); the drift is c a^2: the weight settles where it is allowed."""
    budget, c = Budget(0.02, scale, planned), 3 * scale
    for _ in range(3000):
        a = 1 / (1 + budget.weight * c / scale)
        budget.update(c * a * a, concepts)
    assert math.isclose(c * a * a, SAFETY * 0.02 * scale * min(1, concepts / planned), rel_tol=0.02)


def test_seldom_updates_move_the_weight_as_far():
    """In as many steps of training; the running mean forgets as much"""
    often, seldom = Budget(0.02, 1.0, 1), Budget(0.02, 1.0, 1, every=4)
    for step in range(1, 41):
        often.update(1.0, 1)
        if step % 4 == 0:
            seldom.update(1.0, 1)
    assert math.isclose(often.weight, seldom.weight, rel_tol=1e-6) and often.weight > 3
    often.update(0.0, 1)
    seldom.update(0.0, 1)
    assert math.isclose(seldom.ratio, often.ratio * 0.95**3, rel_tol=1e-6)


def test_a_slack_budget_lets_the_weight_fall_to_its_floor():
    budget = Budget(0.02, 1.0, 1)
    for _ in range(3000):
        budget.update(0.0, 1)
    assert budget.weight == pytest.approx(0.05)


def test_the_base_loss_is_the_base_models_own(model, subjects, calibration):
    """Within fifteen hundredths of the plain mean over many draws of noise"""
    from seqlora_core.evaluation import HeldOut

    config = TrainingConfig()
    replay = Replay(model, subjects["octopus"].references, "octzu", [], calibration, config)
    plain = [i for i, text in enumerate(calibration.prompts) if not is_decoy(text)]
    many = held_out_loss(
        model, HeldOut.of(model, calibration.latents[plain], [calibration.prompts[i] for i in plain], levels=16)
    )
    assert replay.base_loss() == pytest.approx(many, rel=0.15)


@pytest.mark.parametrize("target", ["base", "before"])
def test_what_moves_is_measured_on_pictures_that_are_never_replayed(model, library, subjects, calibration, target):
    """By the earlier concepts and a new one, or by the new one alone; what is attached stays as it is"""
    config = TrainingConfig(replay_target=target, replay_batch=8)
    replay = Replay(model, subjects["fox"].references, "foxqi", [], calibration, config)
    latents = replay.watched[0]
    assert len(latents) == len([i for i, t in enumerate(calibration.prompts) if not (i % WATCHED or is_decoy(t))]) > 1
    assert not any(torch.equal(a, b) for a in latents for b in replay.pools[0].latents)
    concepts = [library.load(n).adapter.scaled(20.0) for n in ("octopus", "penguin")]
    attachment = Attachment()
    attachment.set_frozen(concepts[0])
    attachment.live = {n: (d.down, d.up) for n, d in concepts[1].layers.items()}
    held = attachment.frozen, attachment.live
    with attached(model.sites(), attachment), torch.no_grad():
        moved = replay.moved(attachment, torch.Generator().manual_seed(1), 20)
        assert (attachment.frozen, attachment.live) == held
        generator = torch.Generator().manual_seed(1)
        pick, sigma = torch.randint(0, len(latents), (20,), generator=generator), model.draw_sigmas(20, generator)
        noised = model.noised(latents[pick], torch.randn(latents[pick].shape, generator=generator), sigma)
        prompts = replay.watched[1][pick]
        now = model.predict(noised, sigma, prompts)
        attachment.live, attachment.frozen = {}, {} if target == "base" else held[0]
        expected = (now - model.predict(noised, sigma, prompts)).square().mean().item()
    assert expected > 1e-4 and moved == pytest.approx(expected, rel=1e-4)


def test_a_concept_has_half_its_share_where_earlier_ones_spent_all():
    """Also beyond the plan; where they did not, it has what is left"""
    share = SAFETY * 0.02 / 8
    assert Budget(0.02, 1.0, 8, spent=10 * share).allowed(5) == pytest.approx(40.5 * share)
    assert Budget(0.02, 1.0, 8, spent=share).allowed(9) == pytest.approx(8.5 * share)
    assert Budget(0.02, 1.0, 8, spent=1.1 * share).allowed(5) == pytest.approx(5 * share)
    assert Budget(0.02, 1.0, 8, spent=1.1 * share).notes(4) == []
    (note,) = Budget(0.02, 1.0, 8, spent=10 * share).notes(4)
    assert "what was taught before (4) moves unrelated prompts by about 9.0% already, where 0.9% is its part" in note


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("target", ["base", "before"])
def test_replay_asks_for_the_prediction_that_it_names(model, library, subjects, calibration, target, kept):
    """The part on generic prompts and decoys is the bare model's, or the stack's; that on earlier concepts the stack's.

    kept: whether the calibration knows what it visited while it drew, which those that were made earlier do not."""
    earlier = [library.load(n) for n in ("octopus", "penguin")]
    calibration = calibration if kept else replace(calibration, visited=None)
    replay = Replay(model, subjects["fox"].references, "foxqi", earlier, calibration, TrainingConfig(replay_target=target))
    attachment = Attachment()
    attachment.set_frozen(concatenate([c.adapter for c in earlier]).scaled(20.0))
    frozen = attachment.frozen
    with attached(model.sites(), attachment), torch.no_grad():
        (batch,) = replay.batch(attachment, torch.Generator().manual_seed(0))
        stack = model.predict(batch.noised, batch.sigma, batch.conditioning)
    assert attachment.frozen is frozen and attachment.live == {}
    with torch.no_grad():
        bare = model.predict(batch.noised, batch.sigma, batch.conditioning)
    assert len(batch.noised) == 12
    assert not torch.allclose(bare[:8], stack[:8], atol=1e-3)
    expected = bare if target == "base" else stack
    halved = (
        0 if target == "before" else 8 if kept else 4
    )  # what was kept comes first, in half precision; of decoys it always is
    assert torch.allclose(batch.target[:halved], expected[:halved], atol=1e-2)
    assert torch.allclose(batch.target[halved:8], expected[halved:8], atol=1e-5)
    assert torch.allclose(batch.target[8:], stack[8:], atol=1e-5)


@pytest.mark.parametrize("options, told", [({}, True), ({"drift_budget": 0.0}, False)])
def test_who_goes_on_with_a_library_of_an_earlier_version_is_told_that_its_budget_is_not_kept(
    model, subjects, calibration, new_library, tmp_path, options, told
):
    library = new_library(tmp_path / "l")
    assert not any("earlier version" in note for note in teach(model, library, subjects["fox"], steps=1)[1].notes)
    library.keep_calibration(replace(calibration, visited=None))
    notes = teach(model, library, subjects["octopus"], steps=1, **options)[1].notes
    assert any("'l' was begun by an earlier version" in note for note in notes) == told


def test_what_the_bare_model_said_while_it_drew_is_not_asked_again(model, library, subjects, calibration, monkeypatch):
    """Neither of generic prompts nor of decoys; only of earlier concepts, of which the stack's prediction is asked"""
    asked, predict = [], model.predict
    monkeypatch.setattr(model, "predict", lambda noised, *given: asked.append(len(noised)) or predict(noised, *given))
    for earlier, expected in (([], []), ([library.load("octopus")], [4])):
        replay = Replay(model, subjects["fox"].references, "foxqi", earlier, calibration, TrainingConfig(replay_batch=12))
        asked.clear()
        (batch,) = replay.batch(Attachment(), torch.Generator().manual_seed(0))
        assert asked == expected and len(batch.noised) == 12
        levels = replay.pools[0].visited.sigma
        assert torch.isin(batch.sigma[: 12 // (2 + len(earlier))], levels).all()


def test_what_was_visited_moves_as_what_is_noised_anew(model, calibration):
    """By a LoRA that was not taught with either: else replay would hold something else still than what the budget measures"""
    attachment, moved, drawn = Attachment(), [], torch.Generator().manual_seed(1)
    randn = partial(torch.randn, generator=drawn)
    attachment.set_frozen(
        Adapter({s.name: LayerDelta(randn(4, s.in_features), 0.002 * randn(s.out_features, 4)) for s in model.sites()})
    )
    frozen, prompts = attachment.frozen, model.encode_prompts(calibration.prompts)
    x, sigma, _ = calibration.visited
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with attached(model.sites(), attachment), torch.no_grad():
        for step in range(sigma.shape[1]):
            now = x[:, step].float(), model.noised(calibration.latents, noise[:, step], sigma[:, step])
            for noised in now:
                attachment.frozen = frozen
                with_stack = model.predict(noised, sigma[:, step], prompts)
                attachment.frozen = {}
                moved.append((with_stack - model.predict(noised, sigma[:, step], prompts)).square().mean().item())
    assert sum(moved[::2]) == pytest.approx(sum(moved[1::2]), rel=0.1) and min(moved) > 1e-4


def test_it_is_told_when_earlier_concepts_were_taught_without_a_budget(model, subjects, new_library, tmp_path):
    library = new_library(tmp_path, planned=8)
    teach(model, library, subjects["octopus"], steps=10, replay_weight=0.0, drift_budget=0.0, learning_rate=1e-2)
    _, fit = teach(model, library, subjects["penguin"], steps=1)
    assert any("what was taught before (1) moves unrelated prompts" in note for note in fit.notes)


def test_a_tight_budget_raises_the_weight_and_moves_unrelated_prompts_less(model, subjects, new_library, tmp_path):
    generic, drifts, weights = few_generic(model), [], []
    base = held_out_loss(model, generic)
    for number, budget in enumerate((1e-4, 10.0)):
        library = new_library(tmp_path / str(number), planned=1)
        concept, fit = teach(model, library, subjects["octopus"], steps=25, drift_budget=budget, learning_rate=3e-3)
        drifts.append(held_out_loss(model, generic, concept.adapter) / base - 1)
        weights.append(fit.weights[-1])
    assert weights[0] > 1.5 > 0.5 > weights[1]
    assert abs(drifts[0]) < abs(drifts[1])
