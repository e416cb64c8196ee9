"""What a fit minimises, `L + weight (lambda E + rho R)`, on batches of the references and of replay."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attach import Attachment
from .bilevel import Group, live_layers, mean_energy
from .captions import Prompts
from .concept import References, latent_weights
from .config import TrainingConfig
from .denoiser import Conditioning, Denoiser
from .hypergradient import hypergradient, parse
from .learnt_trigger import LearntTrigger
from .noise_levels import draw_sigmas, min_snr_weights
from .optimisers import gradients
from .parallel import Workers
from .replay import Batch, Replay

DAMPING = 1e-4  # added to the lower level's Hessian, which a network need not keep positive


@dataclass
class Terms:
    """The parts of an objective as numbers: error on the concept, energy E, all together."""

    error: float
    energy: float
    total: float

    @classmethod
    def mean(cls, terms: list[Terms]) -> Terms:
        return cls(*(sum(getattr(t, f.name) for t in terms) / len(terms) for f in fields(cls)))


class Objective:
    """sets: references of one size each; a batch is of one of them, drawn by how many pictures it holds."""

    def __init__(
        self, denoiser: Denoiser, sets: list[References], prompts: list[Prompts], replay: Replay, groups: list[Group],
        learnt: LearntTrigger | None, attachment: Attachment, config: TrainingConfig, generator: torch.Generator, workers: Workers,
    ):  # fmt: skip
        self.denoiser, self.prompts, self.replay, self.groups, self.learnt = denoiser, prompts, replay, groups, learnt
        self.factors = [t for g in groups for t in (g.up, g.basis)] + (learnt.parameters if learnt else [])
        self.attachment, self.config, self.generator, self.workers = attachment, config, generator, workers
        self.latents = [s.latents.to(denoiser.device) for s in sets]
        self.masks = [None if s.masks is None else latent_weights(s.masks, s.latents).to(denoiser.device) for s in sets]
        before = list(itertools.accumulate((_count(s) for s in sets), initial=0))
        known, halves = zip(*map(_known, sets, before))
        # of each size the pictures that are drawn from for a step of both levels, of the lower one, and of the upper one: a single
        # picture is for both
        self.known = {None: known} | {half: found if any(map(len, found)) else known for half, found in enumerate(zip(*halves))}
        self.weight, self.replays = 1.0, True
        self.last: Terms | None = None

    def draw(self, half: int | None = None) -> tuple[Batch, list[Batch]]:
        """A batch of the references (of every second one if half is 0 or 1), and what replay adds to it"""
        d, generator, config, which = self.denoiser, self.generator, self.config, 0
        if len(self.latents) > 1:
            sizes = torch.tensor([len(k) for k in self.known[half]], dtype=torch.float32)
            which = int(torch.multinomial(sizes, 1, generator=generator))
        known, count = self.known[half][which], config.batch
        pick = known[torch.randint(0, len(known), (count,), generator=generator)]
        x, sigma = self.latents[which][pick], draw_sigmas(d, config, count, generator)
        noise = torch.randn(x.shape, generator=generator).to(x)
        conditioning, mask = self.prompts[which].draw(pick, generator), self.masks[which]
        weight = None if mask is None else mask[pick]
        if config.min_snr:
            levels = min_snr_weights(d, sigma, config.min_snr).view(-1, *[1] * (x.ndim - 1))
            weight = levels if weight is None else weight * levels
        own = self.workers.rows(count)
        x, noise, sigma = x[own], noise[own], sigma[own]
        weight = None if weight is None else weight[own]
        batch = Batch(d.noised(x, noise, sigma), sigma, conditioning[own], d.target(x, noise, sigma), weight=weight)
        return batch, self.replay.batch(self.attachment, generator) if self.replays else []

    def value(self, batch: Batch, again: list[Batch]) -> Tensor:
        """The objective as a scalar, differentiable in the groups' factors; one forward pass for all of one size."""
        self.attachment.live = live_layers(self.groups) | (self.learnt.live() if self.learnt else {})
        predictions = self._predict([batch, *again])
        error = _errors(predictions[0], batch).mean()
        energy = mean_energy(self.groups)
        protection = self.config.interference_weight * energy
        if again:
            moved = [_errors(p, b) for p, b in zip(predictions[1:], again)]
            # each process has its rows of one and the same batch, not always as many as the others: their mean over all
            # processes is that of the whole batch
            total = sum(b.whole * m.shape[1:].numel() for m, b in zip(moved, again)) / self.workers.count
            mean = sum(m.sum() for m in moved) / total
            protection = protection + self.config.replay_weight * self.config.replay_every * mean
        total = error + self.weight * protection
        self.last = Terms(error.item(), energy.item(), total.item())
        return total

    def _predict(self, batches: list[Batch]) -> list[Tensor]:
        """The prediction for each batch"""
        alike: dict[torch.Size, list[int]] = {}
        for number, batch in enumerate(batches):
            alike.setdefault(batch.noised.shape[1:], []).append(number)
        out: list[Tensor] = [None] * len(batches)
        for numbers in alike.values():
            together = [batches[n] for n in numbers]
            noised, sigma = (torch.cat([getattr(b, k) for b in together]) for k in ("noised", "sigma"))
            prediction = noised  # of many processes some have no row of a small batch, and most models cannot be given none
            if len(noised):
                prediction = self.denoiser.predict(noised, sigma, Conditioning.cat([b.conditioning for b in together]))
            for number, part in zip(numbers, prediction.split([len(b.noised) for b in together])):
                out[number] = part
        return out

    def gradients(self, upper_turn: bool) -> Terms:
        """Leaves gradients on the groups' factors: the mean over config.accumulate batches and over all processes.

        With lower and upper steps apart, lower ones see one half of the references, upper ones the other.
        """
        for factor in self.factors:
            factor.grad = None
        followed = upper_turn and parse(self.config.hypergradient)[1]
        half, terms, count = None if not self.config.lower_steps else int(upper_turn), [], self.config.accumulate
        self.drawn = []
        for _ in range(count):
            terms.append(self._hypergradient(count) if followed else self._gradient(half, count))
        found = terms[0] if len(terms) == 1 else Terms.mean(terms)
        found = self._averaged(found)
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(self.factors, self.config.clip)
        return found

    def finite(self, upper_turn: bool) -> bool:
        """Whether the last gradients that this turn takes a step along are: a model in half precision may have a loss without"""
        bases = [g.basis for g in self.groups]
        moved = bases if upper_turn else self.factors if not self.config.lower_steps else [g.up for g in self.groups]
        found = [factor.grad.isfinite().all() for factor in moved if factor.grad is not None]
        return bool(torch.stack(found).all()) if found else True

    def _averaged(self, terms: Terms) -> Terms:
        if self.workers.count == 1:
            return terms
        numbers = torch.tensor([getattr(terms, f.name) for f in fields(Terms)], device=self.denoiser.device)
        self.workers.average([numbers, *(t.grad for t in self.factors if t.grad is not None)])
        return Terms(*numbers.tolist())

    @torch.no_grad()
    def again(self) -> float:
        """The objective now, on what the last gradients were of: the mean over their batches and over all processes"""
        values = torch.stack([self.value(*drawn) for drawn in self.drawn]).mean()
        self.workers.average([values])
        return float(values)

    def _gradient(self, half: int | None, count: int) -> Terms:
        """Adds a count-th part of that of one batch to the gradients"""
        self.drawn.append(self.draw(half))
        factors = [f for f in self.factors if f.requires_grad]
        found = gradients(lambda: self.value(*self.drawn[-1]) / count, factors, self.drawn[-1][0].noised.numel())
        for factor, gradient in zip(factors, found):
            if gradient is not None:
                factor.grad = gradient if factor.grad is None else factor.grad + gradient
        return self.last

    def _hypergradient(self, count: int) -> Terms:
        """Adds a count-th part of that of one batch of each half to the bases' gradients; the terms are the query's"""
        support, query = self.draw(0), self.draw(1)
        self.drawn.append(query)
        of_query = []

        def upper() -> Tensor:
            value = self.value(*query)
            of_query.append(self.last)
            return value

        # only the plain attention can be differentiated twice
        with sdpa_kernel(SDPBackend.MATH):
            _, gradients = hypergradient(
                upper, lambda: self.value(*support), [g.up for g in self.groups],
                [g.basis for g in self.groups], self.config.hypergradient, DAMPING,
            )  # fmt: skip
        for group, gradient in zip(self.groups, gradients):
            gradient = gradient / count
            group.basis.grad = gradient if group.basis.grad is None else group.basis.grad + gradient
        return of_query[0]


def _count(references: References) -> int:
    """Pictures, each with its mirror image as one"""
    return len(references.latents) // (2 if references.mirrored else 1)


def _known(references: References, before: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Pictures to draw from, each as often as its repeats say; and their two halves, which have no picture in common.

    before: pictures of other sizes, so that of all sizes together every second picture is in a half.
    """
    known = references.known()
    pictures = before + (known // 2 if references.mirrored else known)
    halves = known[pictures % 2 == 0], known[pictures % 2 == 1]
    return known, halves


def _errors(prediction: Tensor, batch: Batch) -> Tensor:
    errors = (prediction - batch.target).square()
    return errors if batch.weight is None else errors * batch.weight
