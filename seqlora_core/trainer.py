"""Fit one concept on top of the concepts before it: the loop around bilevel's steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from . import subspace
from .adapter import Adapter, concatenate
from .attach import Attachment, attached
from .bilevel import Group, LowerLevel, UpperLevel, live_layers, mean_energy, to_adapter
from .calibration import Calibration, draw, record_moments
from .denoiser import Conditioning, Denoiser
from .errors import UserError
from .linalg import orthonormal_basis, project_out
from .prompts import decoys
from .statistics import Moments, average


@dataclass
class TrainingConfig:
    """Options of a fit.  The last block switches parts of the method off, for ablations."""

    rank: int = 4
    steps: int = 320
    learning_rate: float = 1e-3  # of lora_up
    basis_rate: float = 5e-4
    interference_weight: float = 1.0  # lambda
    batch: int = 8
    seed: int = 0
    planned: int = 32  # concepts the library is meant to hold
    lower_steps: int = 0  # lora_up steps to one basis step; 0: both from every gradient
    retraction: str = "qr"
    protection: float = 1.0  # weight of earlier concepts' moments in the energy
    replay_weight: float = 85.0
    replay_batch: int = 12
    replay_every: int = 1
    keep_latents: int = 8  # of the references, stored for replay by later concepts; 0 for none

    concept_dropout: bool = True
    earlier_active: bool = True
    orthogonal: bool = True
    whitened: bool = True
    data_start: bool = True
    learn_basis: bool = True
    use_decoys: bool = True

    def validate(self) -> None:
        for name, least in (("rank", 1), ("steps", 1), ("batch", 1), ("planned", 1), ("replay_every", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: give at least {least}")
        for name in ("learning_rate", "basis_rate"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a number between 0 and 1, such as 0.001")
        for name in ("interference_weight", "replay_weight", "protection"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: give 0 or more")


@dataclass
class Concept:
    """A trained concept: an ordinary LoRA, and what later concepts need to know of it.

    bases: layer -> [d, r] in the library's whitened coordinates; latents [n, ...] and captions: references kept
    for replay (may be empty).
    """

    name: str
    trigger: str
    class_noun: str
    adapter: Adapter
    moments: Moments
    bases: dict[str, Tensor]
    latents: Tensor
    captions: list[str]


@dataclass
class References:
    """latents [n, ...] of the reference pictures, one caption each."""

    latents: Tensor
    captions: list[str]
    size: tuple[int, int]  # of the pictures, pixels


@dataclass
class Step:
    """What a fit reports after each step."""

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
    notes: list[str] = field(default_factory=list)
    stopped: BaseException | None = None


def fit(
    denoiser: Denoiser, references: References, trigger: str, earlier: list[Concept], calibration: Calibration,
    config: TrainingConfig, on_step: Callable[[Step], None] | None = None,
) -> Fit:  # fmt: skip
    """Train one concept.

    An exception raised by `on_step` ends the loop and is handed back in `Fit.stopped` beside what was trained so
    far; it is the caller's to raise again.  Raises UserError for bad options and for a loss that is not finite.
    """
    config.validate()
    device, sites = denoiser.device, denoiser.sites()
    generator = torch.Generator().manual_seed(config.seed)
    prompts = denoiser.encode_prompts(references.captions)
    latents = references.latents.to(device)
    seen = record_moments(denoiser, references.latents, prompts, seed=config.seed)
    replay = _Replay(denoiser, references, trigger, earlier, calibration, config)
    others = _others(calibration.moments, replay.decoy_moments, earlier, config)
    groups, notes = _start(denoiser, seen, others, earlier, calibration, config, generator)

    attachment = Attachment()
    active = _Earlier(earlier if config.earlier_active else [], sites, config, device)
    lower = LowerLevel(groups, config.learning_rate)
    upper = UpperLevel(groups, config.basis_rate, config.retraction)
    result = Fit(Adapter({}), {}, seen, notes=notes)
    start = time.perf_counter()
    with attached(sites, attachment):
        for number in range(1, config.steps + 1):
            active.switch(attachment, generator)
            attachment.live = live_layers(groups)
            pick = torch.randint(0, len(latents), (config.batch,), generator=generator)
            sigma = denoiser.draw_sigmas(config.batch, generator)
            noise = torch.randn(latents[pick].shape, generator=generator).to(latents)
            batch = Batch(
                denoiser.noised(latents[pick], noise, sigma), sigma, prompts[pick], denoiser.target(latents[pick], noise, sigma)
            )
            again = replay.batch(attachment, generator) if number % config.replay_every == 0 else None
            error, drift = _errors(denoiser, batch, again)
            energy = mean_energy(groups)
            objective = error + config.interference_weight * energy + config.replay_weight * config.replay_every * drift
            if not torch.isfinite(objective):
                raise UserError(f"the loss is not finite at step {number}; lower the learning rate or check the images")
            for group in groups:
                group.up.grad = group.basis.grad = None
            objective.backward()
            pace = schedule(number, config.steps)
            upper_turn = config.lower_steps and number % (config.lower_steps + 1) == 0
            if not upper_turn:
                lower.step(pace)
            if config.learn_basis and (upper_turn or not config.lower_steps):
                upper.step(pace)
            result.losses.append(error.item())
            result.energies.append(energy.item())
            if on_step is not None:
                attachment.live, attachment.frozen = {}, {}  # whatever is drawn now is drawn by the bare model
                seconds = time.perf_counter() - start
                try:
                    on_step(Step(number, config.steps, error.item(), energy.item(), seconds, lambda: to_adapter(groups)))
                except BaseException as stop:  # noqa: BLE001 - a cancel may be any exception; what is trained is kept
                    result.stopped = stop
                    break
    result.adapter = to_adapter(groups).to("cpu")
    result.bases = {n: b.detach().cpu().clone() for g in groups for n, b in zip(g.names, g.basis)}
    attachment = Attachment()
    attachment.live = {n: (d.down.to(device), d.up.to(device)) for n, d in result.adapter.layers.items()}
    result.moments = record_moments(denoiser, references.latents, prompts, attachment, seed=config.seed)
    return result


def schedule(number: int, total: int) -> float:
    """Share of the learning rate at step `number` (from 1): whole for the first half, then linearly to zero."""
    return min(1.0, 2 * (1 - (number - 1) / total))


def settings(config: TrainingConfig) -> dict[str, str]:
    """The options as file metadata"""
    return {f"seqlora.{k}": str(v) for k, v in asdict(config).items()}


def _others(general: Moments, decoy: Moments | None, earlier: list[Concept], config: TrainingConfig) -> Moments:
    """What the concept must leave alone: generic inputs, decoys, and earlier concepts' own inputs."""
    total = general if decoy is None else average([general, decoy])
    protected = average(c.moments for c in earlier)
    if protected is not None and config.protection:
        total = total.plus(protected, config.protection)
    return total


def _start(denoiser, seen, others, earlier, calibration, config, generator) -> tuple[list[Group], list[str]]:
    """Groups of layers of one shape, with the concept's first basis and lora_up = 0."""
    device, parts, notes = denoiser.device, {}, []
    for site in denoiser.sites():
        moment = calibration.moments[site.name]
        if config.whitened:
            metric = subspace.Metric.of(moment)
        else:
            eye = torch.eye(site.in_features)
            metric = subspace.Metric(eye, eye)
        rank = subspace.rank_limit(site.in_features, config.planned, config.rank)
        taken, shared = None, 0
        if config.orthogonal:
            held = [c.bases[site.name] for c in earlier if site.name in c.bases]
            taken, shared = subspace.occupied_basis(held, rank)
        if shared:
            notes.append(f"{site.name} is full: the {shared} least used directions of earlier concepts are shared")
        if config.data_start:
            basis = subspace.data_driven_basis(seen[site.name], metric, rank, taken)
        else:
            random = torch.randn(site.in_features, rank, generator=generator)
            basis = orthonormal_basis(project_out(random, taken))
        scale = 1 / site.weight_energy(moment.to(device)).clamp_min(1e-12)
        columns = 0 if taken is None else taken.shape[1]
        key = (site.in_features, site.out_features, rank, columns)
        white_others = metric.white @ others[site.name] @ metric.white
        parts.setdefault(key, []).append((site.name, basis, metric.white, white_others, scale.cpu(), taken))
    groups = []
    for (_, out, rank, columns), layers in parts.items():
        names, bases, whites, moments, scales, takens = zip(*layers)
        stack = [torch.stack(t).to(device) for t in (bases, whites, moments, scales)]
        basis = stack[0].requires_grad_(config.learn_basis)
        up = torch.zeros(len(names), out, rank, device=device, requires_grad=True)
        taken = torch.stack(takens).to(device) if columns else None
        groups.append(Group(list(names), up, basis, stack[1], stack[2], stack[3], taken))
    return groups, notes


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

    def switch(self, attachment: Attachment, generator: torch.Generator) -> None:
        """None of them a quarter of the time, all a quarter, a random half otherwise"""
        if not self.count:
            return
        attachment.frozen = self.pairs
        on = torch.ones(self.count)
        if self.dropout:
            draw = torch.rand(1, generator=generator).item()
            half = (torch.rand(self.count, generator=generator) < 0.5).float()
            on = on * 0 if draw < 0.25 else on if draw < 0.5 else half
        attachment.mask = {n: on[owner].to(self.device) for n, owner in self.owner.items()}


class _Replay:
    """Prompts on which the model must go on predicting what it predicted before this concept.

    A pool of generic pictures, decoys of this concept, and kept references of earlier concepts, drawn in equal
    parts from those that exist.
    """

    def __init__(self, denoiser, references, trigger, earlier, calibration, config):
        self.denoiser, self.config = denoiser, config
        self.pools: list[tuple[Tensor, Conditioning]] = []
        self.decoy_moments: Moments | None = None
        if config.replay_weight:
            self._add(calibration.latents, calibration.prompts)
        if config.use_decoys:
            prompts = decoys(references.captions, trigger, 24, config.seed)
            latents = draw(denoiser, prompts, config.seed, references.size)
            self.decoy_moments = record_moments(denoiser, latents, denoiser.encode_prompts(prompts), seed=config.seed)
            if config.replay_weight:
                self._add(latents, prompts)
        kept = [c for c in earlier if len(c.latents)]
        if kept and config.replay_weight:
            self._add(torch.cat([c.latents for c in kept]), [t for c in kept for t in c.captions])

    def _add(self, latents: Tensor, prompts: list[str]) -> None:
        self.pools.append((latents.to(self.denoiser.device), self.denoiser.encode_prompts(prompts)))

    def batch(self, attachment: Attachment, generator: torch.Generator) -> Batch | None:
        """What the concept must not change: inputs of the pool with the prediction that is made without it."""
        if not self.pools:
            return None
        d, share = self.denoiser, max(1, self.config.replay_batch // len(self.pools))
        latents, prompts = [], []
        for pool, conditioning in self.pools:
            pick = torch.randint(0, len(pool), (share,), generator=generator)
            latents.append(pool[pick])
            prompts.append(conditioning[pick])
        x, conditioning = torch.cat(latents), Conditioning.cat(prompts)
        sigma = d.draw_sigmas(len(x), generator)
        noised = d.noised(x, torch.randn(x.shape, generator=generator).to(x), sigma)
        live, attachment.live = attachment.live, {}
        with torch.no_grad():
            before = d.predict(noised, sigma, conditioning)
        attachment.live = live
        return Batch(noised, sigma, conditioning, before)


@dataclass
class Batch:
    """Inputs of the denoiser and what it should predict."""

    noised: Tensor
    sigma: Tensor
    conditioning: Conditioning
    target: Tensor


def _errors(denoiser: Denoiser, batch: Batch, again: Batch | None) -> tuple[Tensor, Tensor | float]:
    """Mean squared errors of a batch and of a replay batch (0.0 without one), from one forward pass."""
    if again is None:
        return (denoiser.predict(batch.noised, batch.sigma, batch.conditioning) - batch.target).square().mean(), 0.0
    noised, sigma = torch.cat([batch.noised, again.noised]), torch.cat([batch.sigma, again.sigma])
    prediction = denoiser.predict(noised, sigma, Conditioning.cat([batch.conditioning, again.conditioning]))
    count = len(batch.noised)
    return (prediction[:count] - batch.target).square().mean(), (prediction[count:] - again.target).square().mean()
