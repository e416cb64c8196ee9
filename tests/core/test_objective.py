"""What a fit minimises, batch by batch: accumulation, clipping, the halves of the two levels, the line search."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from seqlora_core.adapter import Adapter
from seqlora_core.attach import Attachment, attached
from seqlora_core.bilevel import LowerLevel, UpperLevel, to_adapter
from seqlora_core.calibration import record_moments
from seqlora_core.captions import Prompts
from seqlora_core.concept import Concept, References
from seqlora_core.config import TrainingConfig
from seqlora_core.hypergradient import hypergradient
from seqlora_core.objective import DAMPING, Objective, _known
from seqlora_core.parallel import Workers
from seqlora_core.prompts import RARE_WORDS, calls, decoys, without
from seqlora_core.replay import Batch, Replay
from seqlora_core.start import starting_groups


def objective_of(model, references, config, calibration):
    generator = torch.Generator().manual_seed(0)
    prompts = Prompts(model, references.captions, "octzu", config)
    seen = record_moments(model, references.latents, prompts.plain)
    replay = Replay(model, references, "octzu", [], calibration, config)
    groups, _ = starting_groups(model, seen, calibration.moments, [], calibration, config, generator)
    return Objective(model, [references], [prompts], replay, groups, None, Attachment(), config, generator, Workers())


def test_accumulated_batches_are_one_large_batch(model, subjects, calibration):
    """Mean of two batches' gradients = gradient of both together, the energy term being the same."""
    s, grads = subjects["octopus"], []
    for batch, accumulate in ((2, 2), (4, 1)):
        config = TrainingConfig(batch=batch, accumulate=accumulate, use_decoys=False, replay_weight=0.0)
        objective = objective_of(model, s.references, config, calibration)
        (prompts,), groups = objective.prompts, objective.groups
        drawn = torch.Generator().manual_seed(1)
        x, noise, sigma = s.references.latents[:4], torch.randn(4, 16, 8, 8, generator=drawn), torch.rand(4, generator=drawn)
        parts = iter(
            [(objective_batch(model, x[i], noise[i], sigma[i], prompts.plain[i]), []) for i in torch.arange(4).split(batch)]
        )
        objective.draw = lambda half, parts=parts: next(parts)
        with attached(model.sites(), objective.attachment):
            objective.gradients(False)
        grads.append(torch.cat([g.up.grad.flatten() for g in groups]))
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-7) and grads[0].abs().max() > 0


@pytest.mark.parametrize("repeats, mirrored", [(None, False), ([2, 2, 2, 2], False), (None, True), ([1, 1, 3, 3], True)])
def test_the_two_levels_share_no_picture(model, subjects, calibration, repeats, mirrored):
    s = subjects["octopus"].references
    four = replace(s, latents=s.latents[:4], captions=s.captions[:4], repeats=repeats, mirrored=mirrored)
    known = objective_of(model, four, TrainingConfig(use_decoys=False, replay_weight=0.0), calibration).known
    halves = [known[half][0] for half in (0, 1)]
    support, query = ({n // 2 if mirrored else n for n in half.tolist()} for half in halves)
    assert support and query and not support & query
    assert sorted(torch.cat(halves).tolist()) == sorted(n for n in range(4) for _ in range(repeats[n] if repeats else 1))


def test_of_several_sizes_too_the_two_levels_share_no_picture():
    """Each size has one picture: every second of all is for one level; and a single one for both"""
    ones = [References(torch.zeros(1, 1, n, 4), ["a"], (8 * n, 32)) for n in (1, 2, 3, 4)]
    halves = [_known(s, before)[1] for before, s in enumerate(ones)]
    assert [[len(h) for h in half] for half in halves] == [[1, 0], [0, 1], [1, 0], [0, 1]]


def test_hypergradients_are_accumulated_and_clipped(model, subjects, calibration):
    """Of the same two pairs of batches: the mean of their hypergradients; clipped, as long as was said; told is the query's error"""
    found = {}
    for accumulate, clip in ((1, 0.0), (2, 0.0), (2, 1e-6)):
        config = TrainingConfig(
            batch=2, accumulate=accumulate, clip=clip, lower_steps=1, hypergradient="cg:2", use_decoys=False, replay_weight=0.0
        )  # fmt: skip
        objective = objective_of(model, subjects["octopus"].references, config, calibration)
        some_up(objective, 0.01)
        with attached(model.sites(), objective.attachment):
            for _ in range(3 - accumulate):
                told = objective.gradients(True)
                assert told.total == pytest.approx(objective.again(), rel=1e-4)  # the query's, as of a plain step of the bases
                gradient = torch.cat([g.basis.grad.flatten() for g in objective.groups])
                found.setdefault((accumulate, clip), []).append(gradient)
    one, two = found[1, 0.0]
    assert torch.allclose(found[2, 0.0][0], (one + two) / 2, rtol=1e-3, atol=1e-7) and one.norm() > 1e-4
    assert found[2, 1e-6][0].norm() == pytest.approx(1e-6, rel=1e-3)


def some_up(objective, size):
    """At lora_up = 0 neither the basis nor the energy has anything to say"""
    with torch.no_grad():
        for group in objective.groups:
            group.up.copy_(size * torch.randn(group.up.shape, generator=torch.Generator().manual_seed(3)))


def watch_draws(objective):
    """Each draw's (batch, what replay adds) and its pictures, as they are made"""
    drawn, picks, draw, (prompts,) = [], [], objective.draw, objective.prompts

    def watched(half):
        drawn.append(draw(half))
        return drawn[-1]

    def draw_prompts(pick, generator):
        picks.append(set(pick.tolist()))
        return prompts.plain[pick]

    objective.draw, prompts.draw = watched, draw_prompts
    return drawn, picks


def test_the_upper_levels_gradient_is_the_hypergradient_of_the_query_with_lora_up_following_the_support(
    model, subjects, calibration
):
    config = TrainingConfig(batch=4, lower_steps=1, hypergradient="cg:2", use_decoys=False, replay_weight=0.0)
    objective = objective_of(model, subjects["octopus"].references, config, calibration)
    some_up(objective, 0.01)
    drawn, picks = watch_draws(objective)
    ups, bases = [g.up for g in objective.groups], [g.basis for g in objective.groups]
    with attached(model.sites(), objective.attachment):
        objective.gradients(True)
        found = torch.cat([b.grad.flatten() for b in bases])
        halves = [next(d for d, p in zip(drawn, picks) if all(n % 2 == half for n in p)) for half in (0, 1)]

        def of(upper, lower, how="cg:2"):
            with sdpa_kernel(SDPBackend.MATH):
                value = (lambda: objective.value(*halves[upper])), (lambda: objective.value(*halves[lower]))
                return torch.cat([g.flatten() for g in hypergradient(*value, ups, bases, how, DAMPING)[1]])

        assert len(drawn) == 2 and torch.allclose(found, of(1, 0), rtol=1e-3, atol=1e-6)
        others = [of(0, 1), of(1, 1), of(1, 0, "none")]  # levels swapped, all of one batch, lora_up as it is
    assert all((found - other).norm() > 0.02 * found.norm() for other in others)


def test_without_a_hypergradient_each_level_sees_its_own_pictures(model, subjects, calibration):
    config = TrainingConfig(batch=4, lower_steps=1, use_decoys=False, replay_weight=0.0)
    objective = objective_of(model, subjects["octopus"].references, config, calibration)
    _, picks = watch_draws(objective)
    with attached(model.sites(), objective.attachment):
        for upper_turn in (False, True, False, True):
            objective.gradients(upper_turn)
    assert [{n % 2 for n in p} for p in picks] == [{0}, {1}, {0}, {1}]


def test_the_objective_is_the_error_and_what_protects_others_at_its_weight(model, subjects, calibration):
    """`L + w (lambda E + rho R)`, each from its plain definition"""
    config = TrainingConfig(batch=4, interference_weight=20.0, replay_weight=3.0, replay_every=2, use_decoys=False)
    objective = objective_of(model, subjects["octopus"].references, config, calibration)
    some_up(objective, 0.05)
    objective.weight = 2.0
    seen, sites = calibration.moments, {s.name: s for s in model.sites()}
    with torch.no_grad(), attached(model.sites(), objective.attachment):
        batch, again = objective.draw()
        value = objective.value(batch, again)
        moved = [(model.predict(b.noised, b.sigma, b.conditioning) - b.target).square() for b in (batch, *again)]
        error, replayed = moved[0].mean(), torch.cat([m.flatten() for m in moved[1:]]).mean()
        changes = {n: d.dense() for n, d in to_adapter(objective.groups).layers.items()}
        energies = [(w @ seen[n] @ w.mT).trace() / sites[n].weight_energy(seen[n]) for n, w in changes.items()]
        energy = sum(energies) / len(energies)
    assert objective.last.error == pytest.approx(float(error), rel=1e-3)
    assert objective.last.energy == pytest.approx(float(energy), rel=1e-3)
    assert float(value) == objective.last.total == pytest.approx(float(error + 2 * (20 * energy + 3 * 2 * replayed)), rel=1e-3)
    assert min(20 * energy, 6 * replayed) > 0.02 * value


def test_a_line_search_never_makes_its_batch_worse(model, subjects, calibration):
    config = TrainingConfig(batch=4, lower_steps=1, line_search=True, use_decoys=False, replay_weight=0.0)
    objective = objective_of(model, subjects["octopus"].references, config, calibration)
    lower, upper = LowerLevel(objective.groups, 4e-3), UpperLevel(objective.groups, 0.5)  # far too long a first step
    with attached(model.sites(), objective.attachment):
        objective.gradients(False)
        lower.step()
        for _ in range(3):
            objective.gradients(True)
            before = objective.again()
            upper.search(objective.again)
            assert objective.again() < before
    for group in objective.groups:
        gram = group.basis.mT @ group.basis
        assert torch.allclose(gram, torch.eye(gram.shape[-1]).expand_as(gram), atol=1e-5)


def objective_batch(model, x, noise, sigma, conditioning):
    return Batch(model.noised(x, noise, sigma), sigma, conditioning, model.target(x, noise, sigma))


def test_no_prompt_that_is_held_calls_a_concept_of_the_library(model, subjects, calibration):
    """Held to the bare model, a prompt with the usual "ohwx" would take from an earlier concept of that name what it learnt"""
    s = subjects["octopus"].references
    texts = Replay(model, s, "octzu", [], calibration, TrainingConfig()).texts
    word = next(w for w in RARE_WORDS if any(calls(w, text) for text in texts))
    earlier = [Concept("one", word.upper(), "", Adapter({}), None, {}, torch.zeros(0), [])]
    for seed in range(3):
        held = Replay(model, s, "octzu", earlier, calibration, TrainingConfig(seed=seed)).texts
        assert held and not any(calls(word, text) for text in held)
    every = decoys(["an octzu animal"], "octzu", 24, taken=RARE_WORDS)
    assert len(every) == 24 and not any(calls("octzu", text) for text in every)
    assert not any(calls("sks", text) for text in decoys(["an octzu animal"], "octzu", 200, taken=["sks dog"]))


def test_pictures_of_the_class_in_many_sizes_are_one_pool(model, subjects, calibration):
    """A step takes one of their sizes, by how often its pictures are taken, and what their masks leave out does not count"""
    s, noise = subjects["octopus"].references, torch.Generator().manual_seed(0)
    latents = [torch.randn(2, 16, 8, width, generator=noise) for width in (8, 10, 12, 14)]
    masks = torch.ones(2, 64, 64)
    masks[:, :, 32:] = 0
    given = [References(x, ["a cat"] * 2, (64, 8 * x.shape[-1]), None, [1, 9] if i else None) for i, x in enumerate(latents)]
    given[0] = replace(given[0], masks=masks)
    replay = Replay(model, s, "octzu", [], calibration, TrainingConfig(replay_batch=12), given)
    assert [pool.known.tolist() for pool in replay.of_class[:2]] == [[0, 1], [0] + [1] * 9]
    drawn, seen = torch.Generator().manual_seed(0), []
    for _ in range(60):
        batches = replay.batch(Attachment(), drawn)
        assert sum(b.whole for b in batches) == 12
        seen.append(batches[-1].noised.shape[-1])
        if seen[-1] == 8:  # beside generic pictures and decoys, which count wherever they are
            (batch,) = batches
            assert (
                (batch.weight[:8] == 1).all() and (batch.weight[8:, ..., :4] == 2).all() and not batch.weight[8:, ..., 4:].any()
            )
        else:
            assert [b.whole for b in batches] == [8, 4] and batches[0].weight is batches[1].weight is None
    assert set(seen) == {8, 10, 12, 14} and seen.count(8) < 10  # 2 of 32


def test_a_trigger_within_other_words_leaves_them_alone():
    caption = "a Tom man at the bottom, customer"
    assert without("tom", caption) == "a  man at the bottom, customer" and without("猫娘", "一只猫娘在笑") == "一只在笑"
    assert without("tom b", "a Tom  b man") == "a  man"
    made = decoys([caption], "tom", 8)
    assert all(text.endswith("man at the bottom, customer") for text in made) and not any(calls("tom", text) for text in made)
