"""Prompts on which the model must go on predicting what it predicted without this concept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attach import Attachment
from .calibration import Calibration, watched
from .concept import Concept, References
from .config import TrainingConfig
from .denoiser import Conditioning, Denoiser, loss
from .drawing import Visited, draw, latents_at_once
from .parallel import Workers
from .pools import Pool
from .prompts import calls, decoys, is_decoy
from .statistics import Moments


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


class Replay:
    """Pools of generic pictures, decoys of this concept, pictures of its class, and kept references of earlier concepts.

    A batch takes equal parts of the pools that there are; pictures of the class are one pool, of which it takes one size, drawn
    by how many pictures it holds.  On generic prompts and decoys the target is what the bare base model predicts
    (config.replay_target "base"), known from when it drew them, so that a later concept also repairs what earlier ones moved, or
    what was predicted before this concept ("before"); on earlier concepts always the latter.

    Some generic pictures are never replayed, nor known to the moments: `moved` looks at them, for what is held is learnt by heart.
    """

    def __init__(
        self, denoiser: Denoiser, references: References, trigger: str, earlier: list[Concept], calibration: Calibration,
        config: TrainingConfig, regularisation: list[References] = (), workers: Workers | None = None,
    ):  # fmt: skip
        self.denoiser, self.config, self.workers = denoiser, config, workers or Workers()
        self.pools: list[Pool] = []  # generic pictures, decoys
        self.of_class: list[Pool] = []
        self.kept: list[Pool] = []  # of earlier concepts
        self.decoy_moments: Moments | None = None
        from_base, taken = config.replay_target == "base", [c.trigger for c in earlier]
        if config.replay_weight:
            # a prompt that calls this concept, as one with the usual "ohwx" may, must not stay as it was, nor one that calls an
            # earlier concept become as it was before that
            texts = calibration.prompts
            free = [i for i, text in enumerate(texts) if not any(calls(word, text) for word in (trigger, *taken))]
            rows = free or list(range(len(texts)))
            plain = [i for i in rows if not is_decoy(texts[i])] or rows
            apart = watched(texts)
            looked_at = [i for i in plain if i in apart] or plain
            replayed = [i for i in plain if i not in apart] or plain
            self.plain = len(replayed)  # of the generic pool, before its decoys
            replayed += [i for i in rows if i not in plain]
            visited = calibration.visited and Visited(*(part[replayed] for part in calibration.visited))
            drawn = calibration.latents[replayed], [texts[i] for i in replayed]
            self.pools.append(Pool(denoiser, *drawn, from_base, visited=visited))
            prompts = denoiser.encode_prompts([texts[i] for i in looked_at])
            self.watched = calibration.latents[looked_at].to(denoiser.device), prompts
        if config.use_decoys:
            prompts = decoys(references.captions, trigger, decoy_count(references.size), config.seed, taken)
            drawn = draw(denoiser, prompts, config.seed, references.size)
            self.decoy_moments = drawn.moments
            if config.replay_weight:
                self.pools.append(Pool(denoiser, drawn.latents, prompts, from_base, visited=drawn.visited))
        if not config.replay_weight:
            return
        self.of_class = [Pool(denoiser, some.latents, some.captions, from_base, some) for some in regularisation]
        kept: dict[torch.Size, list[Concept]] = {}
        for concept in earlier:
            if len(concept.latents):
                kept.setdefault(concept.latents.shape[1:], []).append(concept)
        for alike in kept.values():
            latents, prompts = torch.cat([c.latents for c in alike]), [t for c in alike for t in c.captions]
            self.kept.append(Pool(denoiser, latents, prompts, False))

    @property
    def texts(self) -> list[str]:
        """Every prompt of the pools"""
        return [text for pool in (*self.pools, *self.of_class, *self.kept) for text in pool.texts]

    def _one_of_class(self, generator: torch.Generator) -> list[Pool]:
        """Pictures of the class in one of their sizes, none if there are none"""
        if len(self.of_class) < 2:
            return self.of_class
        often = torch.tensor([len(pool.known) for pool in self.of_class], dtype=torch.float32)
        return [self.of_class[int(torch.multinomial(often, 1, generator=generator))]]

    @torch.no_grad()
    def base_loss(self) -> float:
        """Mean loss of the bare model on the generic pool without its decoys, each picture at one noise level"""
        generic, d, total = self.pools[0], self.denoiser, 0.0
        latents, prompts = generic.latents[: self.plain], generic.prompts
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
        # first those whose targets are known, then those of the bare model, then those of the model with earlier concepts
        pools = sorted(pools, key=lambda pool: (pool.visited is None) + (not pool.from_base))
        noised, sigma, conditioning, weights, said = zip(*(pool.ask(share, generator) for pool in pools))
        noised, sigma, conditioning = torch.cat(noised), torch.cat(sigma), Conditioning.cat(conditioning)
        whole = share * len(pools)
        masked = next((w for w in weights if w is not None), None)
        weight = None if masked is None else torch.cat([torch.ones_like(masked) if w is None else w for w in weights])
        own = torch.arange(whole)[workers.rows(whole)]
        if workers.count > 1:
            noised, sigma, conditioning = noised[own], sigma[own], conditioning[own]
            weight = None if weight is None else weight[own]
        said = [rows for rows in said if rows is not None]
        known, bare = (int((own < share * count).sum()) for count in (len(said), sum(pool.from_base for pool in pools)))
        targets = [torch.cat(said)[own[:known]] if said else noised[:0]]
        live, frozen = attachment.live, attachment.frozen
        attachment.live = {}
        for part, adapters in ((slice(known, bare), {}), (slice(bare, len(own)), frozen)):
            if part.start < part.stop:
                attachment.frozen = adapters
                targets.append(d.predict(noised[part], sigma[part], conditioning[part]))
        attachment.live, attachment.frozen = live, frozen
        return Batch(noised, sigma, conditioning, torch.cat(targets), weight, whole)
