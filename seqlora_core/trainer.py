"""Fit one concept on top of the concepts before it: the loop around bilevel's steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .adapter import Adapter, concatenate
from .attach import Attachment, attached
from .bilevel import Group, LowerLevel, UpperLevel, live_layers, mean_energy, to_adapter
from .budget import Budget
from .calibration import Calibration, record_moments
from .checkpoint import Checkpoints, Progress
from .concept import Concept, References
from .config import TrainingConfig
from .denoiser import Conditioning, Denoiser
from .errors import UserError
from .hypergradient import hypergradient, parse
from .replay import Batch, Replay
from .start import others_moments, starting_groups
from .statistics import Moments

DAMPING = 1e-4  # added to the lower level's Hessian, which a network need not keep positive


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
    """adapter, bases and moments of the concept; curves: what each step reported.  stopped: what ended it early."""

    adapter: Adapter
    bases: dict[str, Tensor]
    moments: Moments
    losses: list[float] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # of what protects others, as the budget set it
    notes: list[str] = field(default_factory=list)
    stopped: BaseException | None = None


def fit(
    denoiser: Denoiser, references: References, trigger: str, earlier: list[Concept], calibration: Calibration,
    config: TrainingConfig, on_step: Callable[[Step], None] | None = None, checkpoints: Checkpoints | None = None,
) -> Fit:  # fmt: skip
    """Train one concept.

    An exception raised by `on_step` ends the loop and is handed back in `Fit.stopped` beside what was trained so
    far; it is the caller's to raise again.  With `checkpoints` the run goes on after the last of them, to the same
    end as if it had never stopped; one is written every so often, and one when the run is stopped.  A checkpoint that
    cannot be written stops the run.  Raises UserError for bad options and for a loss that is not finite.
    """
    config.validate()
    device, sites = denoiser.device, denoiser.sites()
    generator = torch.Generator().manual_seed(config.seed)
    prompts = denoiser.encode_prompts(references.captions)
    seen = record_moments(denoiser, references.latents, prompts, seed=config.seed)
    replay = Replay(denoiser, references, trigger, earlier, calibration, config)
    others = others_moments(calibration.moments, replay.decoy_moments, earlier, config)
    groups, notes = starting_groups(denoiser, seen, others, earlier, calibration, config, generator)

    attachment = Attachment()
    active = _Earlier(earlier if config.earlier_active else [], sites, config, device)
    objective = Objective(denoiser, references, prompts, replay, groups, attachment, config, generator)
    lower = LowerLevel(groups, config.learning_rate)
    upper = UpperLevel(groups, config.basis_rate, config.retraction)
    budget = None
    if config.drift_budget and config.replay_weight:
        budget = Budget(config.drift_budget, replay.base_loss(), config.planned)
    result = Fit(Adapter({}), {}, seen, notes=notes)
    progress = Progress(groups, lower, upper, generator, objective, budget, result)
    done = progress.resume(checkpoints) if checkpoints else 0
    start = time.perf_counter()
    with attached(sites, attachment):
        for number in range(done + 1, config.steps + 1):
            on = active.switch(attachment, generator)
            upper_turn = bool(config.lower_steps) and number % (config.lower_steps + 1) == 0
            objective.replays = number % config.replay_every == 0
            terms = _gradients(objective, groups, upper_turn, config)
            if not math.isfinite(terms.total):
                raise UserError(f"the loss is not finite at step {number}; lower the learning rate or check the images")
            pace = schedule(number, config.steps)
            if not upper_turn:
                lower.step(pace)
            if config.learn_basis and (upper_turn or not config.lower_steps):
                upper.step(pace)
            if budget is not None and objective.replays:
                budget.update(terms.drift, on + 1 if config.replay_target == "base" else 1)
                objective.weight = budget.weight
            result.losses.append(terms.error)
            result.energies.append(terms.energy)
            result.weights.append(objective.weight)
            attachment.live, attachment.frozen = {}, {}  # whatever is drawn now is drawn by the bare model
            seconds = (time.perf_counter() - start) * number / (number - done)
            try:
                if checkpoints and checkpoints.due(number):
                    checkpoints.save(number, progress.state())
                if on_step is not None:
                    on_step(Step(number, config.steps, terms.error, terms.energy, seconds, lambda: to_adapter(groups)))
            except BaseException as stop:  # noqa: BLE001 - a cancel may be any exception; what is trained is kept
                result.stopped = stop
                break
        if checkpoints and result.stopped is not None:
            with contextlib.suppress(UserError):  # of a full disk, which may be what stopped it
                checkpoints.save(len(result.losses), progress.state())
    result.adapter = to_adapter(groups).to("cpu")
    result.bases = {n: b.detach().cpu().clone() for g in groups for n, b in zip(g.names, g.basis)}
    result.moments = record_moments(denoiser, references.latents, prompts, result.adapter, seed=config.seed)
    return result


@dataclass
class Terms:
    """The parts of an objective as numbers: error on the concept, energy E, drift of generic prompts, all together."""

    error: float
    energy: float
    drift: float
    total: float


class Objective:
    """`L + weight (lambda E + rho R)` on batches of the references and of replay."""

    def __init__(self, denoiser, references, prompts, replay, groups, attachment, config, generator):
        self.denoiser, self.prompts, self.replay, self.groups = denoiser, prompts, replay, groups
        self.attachment, self.config, self.generator = attachment, config, generator
        self.latents = references.latents.to(denoiser.device)
        self.weight, self.replays = 1.0, True
        self.last: Terms | None = None

    def draw(self, half: int | None = None) -> tuple[Batch, Batch | None]:
        """A batch of the references (of every second one if half is 0 or 1) and one of replay"""
        d, generator, count = self.denoiser, self.generator, self.config.batch
        known = torch.arange(len(self.latents))
        if half is not None and len(known) > 1:
            known = known[half::2]
        pick = known[torch.randint(0, len(known), (count,), generator=generator)]
        x, sigma = self.latents[pick], d.draw_sigmas(count, generator)
        noise = torch.randn(x.shape, generator=generator).to(x)
        batch = Batch(d.noised(x, noise, sigma), sigma, self.prompts[pick], d.target(x, noise, sigma))
        return batch, self.replay.batch(self.attachment, generator) if self.replays else None

    def value(self, batch: Batch, again: Batch | None) -> Tensor:
        """The objective as a scalar, differentiable in the groups' factors; one forward pass for both batches."""
        self.attachment.live = live_layers(self.groups)
        inputs = [batch] if again is None else [batch, again]
        noised, sigma = (torch.cat([getattr(b, k) for b in inputs]) for k in ("noised", "sigma"))
        prediction = self.denoiser.predict(noised, sigma, Conditioning.cat([b.conditioning for b in inputs]))
        count = len(batch.noised)
        error, energy = (prediction[:count] - batch.target).square().mean(), mean_energy(self.groups)
        protection, drift = self.config.interference_weight * energy, 0.0
        if again is not None:
            moved = (prediction[count:] - again.target).square()
            protection = protection + self.config.replay_weight * self.config.replay_every * moved.mean()
            drift = moved[: again.generic].mean().item()
        total = error + self.weight * protection
        self.last = Terms(error.item(), energy.item(), drift, total.item())
        return total


def _gradients(objective: Objective, groups: list[Group], upper_turn: bool, config: TrainingConfig) -> Terms:
    """Leaves gradients on the groups' factors.

    With lower and upper steps apart, lower ones see one half of the references, upper ones the other.
    """
    for group in groups:
        group.up.grad = group.basis.grad = None
    if not (upper_turn and parse(config.hypergradient)[1]):
        objective.value(*objective.draw(None if not config.lower_steps else int(upper_turn))).backward()
        return objective.last
    support, query = objective.draw(0), objective.draw(1)
    # only the plain attention can be differentiated twice
    with sdpa_kernel(SDPBackend.MATH):
        _, gradients = hypergradient(
            lambda: objective.value(*query), lambda: objective.value(*support), [g.up for g in groups],
            [g.basis for g in groups], config.hypergradient, DAMPING,
        )  # fmt: skip
    for group, gradient in zip(groups, gradients):
        group.basis.grad = gradient
    return objective.last


def schedule(number: int, total: int) -> float:
    """Share of the learning rate at step `number` (from 1): whole for the first half, then linearly to zero."""
    return min(1.0, 2 * (1 - (number - 1) / total))


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
