"""Fit one concept on top of the concepts before it: the loop around bilevel's steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .adapter import Adapter, concatenate, is_token_table
from .attach import Attachment, attached
from .bilevel import LowerLevel, UpperLevel, to_adapter
from .budget import Budget
from .calibration import Calibration, record_moments
from .captions import Prompts
from .checkpoint import Checkpoints, Progress
from .concept import Concept, References, merged
from .config import TrainingConfig
from .denoiser import Denoiser
from .errors import UserError
from .feasible import check_feasible
from .learnt_trigger import COMMON, LearntTrigger
from .objective import Objective
from .optimisers import course
from .parallel import Workers
from .prompts import calls, without
from .recompute import recomputed
from .replay import Replay
from .selection import acts
from .start import others_moments, starting_groups
from .statistics import Moments, weighted

# where only the trigger's embeddings learn: no prompt without it ever changes, so there is nothing to protect, and no basis
TRIGGER_ALONE = dict(
    replay_weight=0.0, drift_budget=0.0, use_decoys=False, lower_steps=0, hypergradient="none", line_search=False
)  # fmt: skip

LOOK_EVERY = 3  # steps from one look at what the budget limits to the next
SPENT_DRAWS = 64  # of a look at what earlier concepts have spent


@dataclass
class Step:
    """What a fit reports after each step; seconds: since the first step, estimated if the run was resumed."""

    number: int
    total: int
    loss: float
    energy: float
    seconds: float
    snapshot: Callable[[], Adapter]  # the concept as it is now


@dataclass
class Fit:
    """adapter, bases and moments of the concept; curves: what each step reported.  stopped: what ended it early.  config: its
    options as they were used."""

    config: TrainingConfig
    adapter: Adapter
    bases: dict[str, Tensor]
    moments: Moments
    losses: list[float] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # of what protects others, as the budget set it
    notes: list[str] = field(default_factory=list)
    stopped: BaseException | None = None


def fit(
    denoiser: Denoiser, references: References | list[References], trigger: str, earlier: list[Concept],
    calibration: Calibration, config: TrainingConfig, on_step: Callable[[Step], None] | None = None,
    checkpoints: Checkpoints | None = None, regularisation: list[References] = (), workers: Workers | None = None,
) -> Fit:  # fmt: skip
    """Train one concept.

    references: of one size, or of several, the most numerous first.  regularisation: pictures of the class on which the
    model must stay as it is.  With several `workers` each trains on its rows of every batch.

    An exception raised by `on_step` ends the loop and is handed back in `Fit.stopped` beside what was trained so
    far; it is the caller's to raise again.  With `checkpoints` the run goes on after the last of them, to the same
    end as if it had never stopped; one is written every so often, and one when the run is stopped.  A checkpoint that
    cannot be written stops the run.  Raises UserError for bad options and for a loss that is not finite.
    """
    workers = workers or Workers()
    check_feasible(denoiser, config, workers)
    if not any(acts(s.name, config.layers) for s in denoiser.sites() if not is_token_table(s.name)):
        config = replace(config, **TRIGGER_ALONE)
    device, sites = denoiser.device, denoiser.sites()
    generator = torch.Generator().manual_seed(config.seed)
    sets = references if isinstance(references, list) else [references]
    prompts = [Prompts(denoiser, s.captions, trigger, config) for s in sets]
    seen = _moments(denoiser, sets, prompts, None, config.seed)
    replay = Replay(denoiser, merged(sets), trigger, earlier, calibration, config, regularisation, workers)
    others = others_moments(calibration.moments, replay.decoy_moments, earlier, config)
    groups, notes = starting_groups(denoiser, seen, others, earlier, calibration, config, generator)

    learnt = None
    if config.learn_trigger:
        others_say = _other_prompts(sets, trigger, earlier, calibration, replay)
        learnt = LearntTrigger(denoiser, trigger, others_say, config.trigger_rate, merged(sets).captions)
        notes += learnt.notes(trigger)
    attachment = Attachment()
    active = _Earlier(earlier if config.earlier_active else [], sites, config, device)
    objective = Objective(denoiser, sets, prompts, replay, groups, learnt, attachment, config, generator, workers)
    lower = LowerLevel(groups, config.learning_rate, config.optimiser, config.weight_decay)
    upper = UpperLevel(groups, config.basis_rate, config.retraction)
    budget = None
    if config.drift_budget and config.replay_weight:
        spent = 0.0
        if active.count and config.replay_target == "base":
            attachment.frozen = active.pairs
            with attached(sites, attachment):
                spent = replay.moved(attachment, torch.Generator().manual_seed(config.seed), SPENT_DRAWS) / active.count
        budget = Budget(config.drift_budget, replay.base_loss(), config.planned, LOOK_EVERY, spent)
        notes += budget.notes(active.count)
    result = Fit(config, Adapter({}), {}, Moments(), notes=notes)
    replay.decoy_moments = seen = others = None  # the start has used them: they would only take room from here on
    progress = Progress(groups, lower, upper, learnt, generator, objective, budget, result)
    done = progress.resume(checkpoints) if checkpoints else 0
    start = time.perf_counter()

    def concept() -> Adapter:  # in main memory, where all others are
        return Adapter(to_adapter(groups).layers | (learnt.layers() if learnt else {})).to("cpu")

    pace = course(config.schedule, config.steps, config.warmup)
    memory = recomputed(denoiser.network(), sites) if config.gradient_checkpointing else contextlib.nullcontext()
    with memory, attached(sites, attachment):
        for number in range(done + 1, config.steps + 1):
            on = active.switch(attachment, generator)
            uppers = number // (config.lower_steps + 1) if config.lower_steps else 0  # basis steps so far, this one included
            upper_turn = bool(config.lower_steps) and number % (config.lower_steps + 1) == 0
            # counted for each level apart: else both periods could fit so that lora_up never sees a replay
            objective.replays = (uppers if upper_turn else number - uppers) % config.replay_every == 0
            terms = objective.gradients(upper_turn)
            if not (math.isfinite(terms.total) and objective.finite(upper_turn)):
                what = "gradient of the loss" if math.isfinite(terms.total) else "loss"
                raise UserError(f"the {what} is not finite at step {number}; lower the learning rate or check the images")
            if budget is not None and number % LOOK_EVERY == 0:
                budget.update(replay.moved(attachment, generator), on + 1 if config.replay_target == "base" else 1)
                objective.weight = budget.weight
            if not upper_turn:
                lower.step(pace[number - 1])
                if learnt is not None:
                    learnt.step(pace[number - 1])
            if config.learn_basis and (upper_turn or not config.lower_steps):
                if config.line_search:
                    upper.search(objective.again, pace[number - 1])
                else:
                    upper.step(pace[number - 1])
            result.losses.append(terms.error)
            result.energies.append(terms.energy)
            result.weights.append(objective.weight)
            attachment.live, attachment.frozen = {}, {}  # whatever is drawn now is drawn by the bare model
            seconds = (time.perf_counter() - start) * number / (number - done)
            try:
                if checkpoints and checkpoints.due(number) and workers.first:
                    checkpoints.save(number, progress.state())
                if on_step is not None:
                    on_step(Step(number, config.steps, terms.error, terms.energy, seconds, concept))
            except BaseException as stop:  # noqa: BLE001 - a cancel may be any exception; what is trained is kept
                result.stopped = stop
            if workers.any(result.stopped is not None):
                result.stopped = result.stopped or KeyboardInterrupt()
                break
        # of one that is done too: what follows may fail for want of memory or room, and would take all steps with it
        if checkpoints and workers.first and len(result.losses) > done:
            with contextlib.suppress(UserError):  # of a full disk, which may be what stopped it
                checkpoints.save(len(result.losses), progress.state())
    result.adapter = concept()
    result.bases = {n: b.detach().cpu().clone() for g in groups for n, b in zip(g.names, g.basis) if n in result.adapter.layers}
    groups = learnt = lower = upper = objective = progress = replay = active = None  # what follows needs the room
    result.moments = _moments(denoiser, sets, prompts, result.adapter, config.seed)
    return result


def _other_prompts(
    sets: list[References], trigger: str, earlier: list[Concept], calibration: Calibration, replay: Replay
) -> list[str]:
    """Whose tokens are not the trigger's own: all that is replayed, earlier triggers, and the rest of the captions"""
    rest = [without(trigger, caption) for s in sets for caption in s.captions]
    generic = [p for p in calibration.prompts if not calls(trigger, p)]
    called = [text for c in earlier for text in (c.trigger, f"{COMMON} {c.trigger}")]
    return ["", *generic, *replay.texts, *rest, *called]


def _moments(denoiser, sets: list[References], prompts: list[Prompts], adapter: Adapter | None, seed: int) -> Moments:
    """Over all sizes, each by its share of the pictures' area"""
    found = [record_moments(denoiser, s.latents, p.plain, adapter, seed=seed) for s, p in zip(sets, prompts)]
    return found[0] if len(found) == 1 else weighted(found, [s.latents.numel() for s in sets])


class _Earlier:
    """Earlier concepts as one frozen adapter, switched on and off from step to step (concept dropout)."""

    def __init__(self, earlier: list[Concept], sites, config: TrainingConfig, device):
        self.count, self.dropout = len(earlier), config.concept_dropout
        stack = concatenate([c.adapter for c in earlier]).to(device) if earlier else Adapter({})
        self.pairs = {n: (d.down, d.up) for n, d in stack.layers.items()}
        self.owner = {
            n: torch.cat([torch.full((c.adapter.layers[n].rank,), i) for i, c in enumerate(earlier) if n in c.adapter.layers])
            for n in stack.layers
        }
        self.device = device

    def switch(self, attachment: Attachment, generator: torch.Generator) -> int:
        """None of them a quarter of the time, all a quarter, a random half otherwise; returns how many."""
        if not self.count:
            return 0
        attachment.frozen = self.pairs
        on = torch.ones(self.count)
        if self.dropout:
            draw = torch.rand(1, generator=generator).item()
            half = (torch.rand(self.count, generator=generator) < 0.5).float()
            on = on * 0 if draw < 0.25 else on if draw < 0.5 else half
        attachment.mask = {n: on[owner].to(self.device) for n, owner in self.owner.items()}
        return int(on.sum())
