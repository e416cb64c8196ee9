"""Prompts on which the model must go on predicting what it predicted without this concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .attach import Attachment
from .calibration import Calibration
from .concept import Concept, References, latent_weights
from .config import TrainingConfig
from .denoiser import Conditioning, Denoiser, loss
from .drawing import draw, latents_at_once
from .parallel import Workers
from .prompts import calls, decoys, is_decoy
from .statistics import Moments

WATCHED = 6  # every so manieth picture of the generic pool


def decoy_count(size: tuple[int, int]) -> int:
    """Pictures drawn of them"""
    return 24 if max(size) <= 128 else 8


@dataclass
class Batch:
    """Inputs of the denoiser and what it should predict.

    weight: of the squared errors, broadcastable to them; None for all alike.  whole: how many there are in all processes
    together.
    """

    noised: Tensor
    sigma: Tensor
    conditioning: Conditioning
    target: Tensor
    weight: Tensor | None = None
    whole: int = 0


class Pool(NamedTuple):
    """Pictures of one size to draw from.

    from_base: whether the bare base model is the target.  known: their numbers, each as often as it is taken.  weights: of
    their latents' errors, None for all alike.
    """

    latents: Tensor
    prompts: Conditioning
    from_base: bool
    known: Tensor
    weights: Tensor | None


class Replay:
    """Pools of generic pictures, decoys of this concept, pictures of its class, and kept references of earlier concepts.

    A batch takes equal parts of the pools that there are; pictures of the class are one pool, of which it takes one size, drawn
    by how many pictures it holds.  On generic prompts and decoys the target is what the
    bare base model predicts (config.replay_target "base"), so that a later concept also repairs what earlier ones
    moved, or what was predicted before this concept ("before"); on earlier concepts always the latter.

    Some generic pictures are never replayed: `moved` looks at them, for those that are replayed are learnt by heart.
    """

    def __init__(
        self, denoiser: Denoiser, references: References, trigger: str, earlier: list[Concept], calibration: Calibration,
        config: TrainingConfig, regularisation: list[References] = (), workers: Workers | None = None,
    ):  # fmt: skip
        self.denoiser, self.config, self.workers = denoiser, config, workers or Workers()
        self.pools: list[Pool] = []  # generic pictures, decoys
        self.of_class: list[Pool] = []
        self.kept: list[Pool] = []  # of earlier concepts
        self.texts: list[str] = []  # every prompt of the pools
        self.decoy_moments: Moments | None = None
        from_base, taken = config.replay_target == "base", [c.trigger for c in earlier]
        if config.replay_weight:
            # a prompt that calls this concept, as one with the usual "ohwx" may, must not stay as it was, nor one that calls an
            # earlier concept become as it was before that
            texts = calibration.prompts
            free = [i for i, text in enumerate(texts) if not any(calls(word, text) for word in (trigger, *taken))]
            rows = free or list(range(len(texts)))
            plain = [i for i in rows if not is_decoy(texts[i])] or rows
            watched = [i for i in plain if i % WATCHED == 0] or plain
            replayed = [i for i in plain if i % WATCHED] or plain
            self.plain = len(replayed)  # of the generic pool, before its decoys
            replayed += [i for i in rows if i not in plain]
            self.pools.append(self._pool(calibration.latents[replayed], [texts[i] for i in replayed], from_base))
            prompts = denoiser.encode_prompts([texts[i] for i in watched])
            self.watched = calibration.latents[watched].to(denoiser.device), prompts
        if config.use_decoys:
            prompts = decoys(references.captions, trigger, decoy_count(references.size), config.seed, taken)
            latents, self.decoy_moments = draw(denoiser, prompts, config.seed, references.size)
            if config.replay_weight:
                self.pools.append(self._pool(latents, prompts, from_base))
        if not config.replay_weight:
            return
        self.of_class = [self._pool(some.latents, some.captions, from_base, some) for some in regularisation]
        kept: dict[torch.Size, list[Concept]] = {}
        for concept in earlier:
            if len(concept.latents):
                kept.setdefault(concept.latents.shape[1:], []).append(concept)
        for alike in kept.values():
            latents, prompts = torch.cat([c.latents for c in alike]), [t for c in alike for t in c.captions]
            self.kept.append(self._pool(latents, prompts, False))

    def _pool(self, latents: Tensor, prompts: list[str], from_base: bool, given: References | None = None) -> Pool:
        """given: where pictures have repeats and masks"""
        self.texts += prompts
        device = self.denoiser.device
        weights = latent_weights(given.masks, latents).to(device) if given and given.masks is not None else None
        known = given.known() if given else torch.arange(len(latents))
        return Pool(latents.to(device), self.denoiser.encode_prompts(prompts), from_base, known, weights)

    def _one_of_class(self, generator: torch.Generator) -> list[Pool]:
        """Pictures of the class in one of their sizes, none if there are none"""
        if len(self.of_class) < 2:
            return self.of_class
        often = torch.tensor([len(pool.known) for pool in self.of_class], dtype=torch.float32)
        return [self.of_class[int(torch.multinomial(often, 1, generator=generator))]]

    @torch.no_grad()
    def base_loss(self) -> float:
        """Mean loss of the bare model on the generic pool without its decoys, each picture at one noise level"""
        (latents, prompts, *_), d, total = self.pools[0], self.denoiser, 0.0
        latents = latents[: self.plain]
        generator = torch.Generator().manual_seed(self.config.seed)
        sigmas = d.even_sigmas(len(latents))[torch.randperm(len(latents), generator=generator)]
        for index in torch.arange(len(latents)).split(latents_at_once(latents)):
            noise = torch.randn(latents[index].shape, generator=generator).to(latents)
            total += loss(d, latents[index], noise, sigmas[index], prompts[index]).item() * len(index)
        return total / len(latents)

    @torch.no_grad()
    def moved(self, attachment: Attachment, generator: torch.Generator, count: int = 0) -> float:
        """Mean squared change of the prediction on generic pictures that are never replayed, from what replay holds them to,
        by what is attached; over `count` draws, or half as many as a replayed batch has."""
        (latents, prompts), d, total = self.watched, self.denoiser, 0.0
        count = count or -(-self.config.replay_batch // 2)
        pick, sigma = torch.randint(0, len(latents), (count,), generator=generator), d.draw_sigmas(count, generator)
        noise = torch.randn(latents[pick].shape, generator=generator).to(latents)
        live, frozen = attachment.live, attachment.frozen
        for rows in torch.arange(count).split(self.config.replay_batch):
            inputs = d.noised(latents[pick[rows]], noise[rows], sigma[rows]), sigma[rows], prompts[pick[rows]]
            now = d.predict(*inputs)
            attachment.live, attachment.frozen = {}, {} if self.config.replay_target == "base" else frozen
            total += (now - d.predict(*inputs)).square().mean().item() * len(rows)
            attachment.live, attachment.frozen = live, frozen
        moved = torch.tensor(total / count, device=d.device)
        self.workers.average([moved])
        return moved.item()

    @torch.no_grad()
    def batch(self, attachment: Attachment, generator: torch.Generator) -> list[Batch]:
        """Inputs of the pools with their targets, one batch for each size of picture, the generic pool's first.

        Empty if there is no pool.  The attachment is left as it was.
        """
        pools = [*self.pools, *self._one_of_class(generator), *self.kept]
        share = max(1, self.config.replay_batch // max(1, len(pools)))
        alike: dict[torch.Size, list[Pool]] = {}
        for pool in pools:
            alike.setdefault(pool.latents.shape[1:], []).append(pool)
        return [self._batch(some, share, attachment, generator) for some in alike.values()]

    def _batch(self, pools: list[Pool], share: int, attachment: Attachment, generator: torch.Generator) -> Batch:
        d, workers = self.denoiser, self.workers
        latents, prompts, weights = [], [], []
        for pool in pools:
            pick = pool.known[torch.randint(0, len(pool.known), (share,), generator=generator)]
            latents.append(pool.latents[pick])
            prompts.append(pool.prompts[pick])
            weights.append(None if pool.weights is None else pool.weights[pick])
        masked = next((w for w in weights if w is not None), None)
        weight = None if masked is None else torch.cat([torch.ones_like(masked) if w is None else w for w in weights])
        x, conditioning = torch.cat(latents), Conditioning.cat(prompts)
        sigma = d.draw_sigmas(len(x), generator)
        noised = d.noised(x, torch.randn(x.shape, generator=generator).to(x), sigma)
        whole, bare = len(x), share * sum(pool.from_base for pool in pools)  # those pools come first
        own = torch.arange(whole)[workers.rows(whole)]
        if workers.count > 1:
            x, noised, sigma, conditioning = x[own], noised[own], sigma[own], conditioning[own]
            weight = None if weight is None else weight[own]
        live, frozen = attachment.live, attachment.frozen
        attachment.live = {}
        targets = [torch.empty_like(noised[:0])]
        bare = int((own < bare).sum())
        for part, adapters in ((slice(0, bare), {}), (slice(bare, len(x)), frozen)):
            if part.start < part.stop:
                attachment.frozen = adapters
                targets.append(d.predict(noised[part], sigma[part], conditioning[part]))
        attachment.live, attachment.frozen = live, frozen
        return Batch(noised, sigma, conditioning, torch.cat(targets), weight, whole)
