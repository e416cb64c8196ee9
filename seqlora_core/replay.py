"""Prompts on which the model must go on predicting what it predicted without this concept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attach import Attachment
from .calibration import Calibration
from .concept import Concept, References
from .config import TrainingConfig
from .denoiser import Conditioning, Denoiser
from .drawing import draw
from .parallel import Workers
from .prompts import calls, decoys
from .statistics import Moments


def decoy_count(size: tuple[int, int]) -> int:
    """Pictures drawn of them"""
    return 24 if max(size) <= 128 else 8


@dataclass
class Batch:
    """Inputs of the denoiser and what it should predict; the first `generic` of them are unrelated prompts.

    weight: of the squared errors, broadcastable to them; None for all alike.  whole, whole_generic: how many of each there
    are in all processes together.
    """

    noised: Tensor
    sigma: Tensor
    conditioning: Conditioning
    target: Tensor
    generic: int = 0
    weight: Tensor | None = None
    whole: int = 0
    whole_generic: int = 0


class Replay:
    """Pools of generic pictures, decoys of this concept, pictures of its class, and kept references of earlier concepts.

    A batch takes equal parts of the pools that there are.  On generic prompts and decoys the target is what the
    bare base model predicts (config.replay_target "base"), so that a later concept also repairs what earlier ones
    moved, or what was predicted before this concept ("before"); on earlier concepts always the latter.
    """

    def __init__(
        self, denoiser: Denoiser, references: References, trigger: str, earlier: list[Concept], calibration: Calibration,
        config: TrainingConfig, regularisation: list[References] = (), workers: Workers | None = None,
    ):  # fmt: skip
        self.denoiser, self.config, self.workers = denoiser, config, workers or Workers()
        self.pools: list[tuple[Tensor, Conditioning, bool]] = []  # latents, prompts, whether the base is the target
        self.texts: list[str] = []  # every prompt of the pools
        self.decoy_moments: Moments | None = None
        from_base = config.replay_target == "base"
        if config.replay_weight:
            # a prompt that calls this concept, as one with the usual "ohwx" may, must not stay as it was
            rows = [i for i, p in enumerate(calibration.prompts) if not calls(trigger, p)] or range(len(calibration.prompts))
            self._add(calibration.latents[rows], [calibration.prompts[i] for i in rows], from_base)
        if config.use_decoys:
            prompts = decoys(references.captions, trigger, decoy_count(references.size), config.seed)
            latents, self.decoy_moments = draw(denoiser, prompts, config.seed, references.size)
            if config.replay_weight:
                self._add(latents, prompts, from_base)
        if not config.replay_weight:
            return
        for pictures in regularisation:
            self._add(pictures.latents, pictures.captions, from_base)
        kept: dict[torch.Size, list[Concept]] = {}
        for concept in earlier:
            if len(concept.latents):
                kept.setdefault(concept.latents.shape[1:], []).append(concept)
        for alike in kept.values():
            self._add(torch.cat([c.latents for c in alike]), [t for c in alike for t in c.captions], False)

    def _add(self, latents: Tensor, prompts: list[str], from_base: bool) -> None:
        self.texts += prompts
        self.pools.append((latents.to(self.denoiser.device), self.denoiser.encode_prompts(prompts), from_base))

    @torch.no_grad()
    def base_loss(self, attachment: Attachment, batch: int = 32) -> tuple[float, float]:
        """On the generic pool, each picture at one noise level: mean loss of the bare model, and the mean squared change of
        its predictions by what is attached as frozen."""
        (latents, prompts, _), d, error, change = self.pools[0], self.denoiser, 0.0, 0.0
        generator = torch.Generator().manual_seed(self.config.seed)
        sigmas = d.even_sigmas(len(latents))[torch.randperm(len(latents), generator=generator)]
        frozen = attachment.frozen
        for index in torch.arange(len(latents)).split(batch):
            x, sigma, conditioning = latents[index], sigmas[index], prompts[index]
            noise = torch.randn(x.shape, generator=generator).to(x)
            noised, attachment.frozen = d.noised(x, noise, sigma), {}
            bare = d.predict(noised, sigma, conditioning)
            error += (bare - d.target(x, noise, sigma)).square().mean().item() * len(index)
            attachment.frozen = frozen
            if frozen:
                change += (d.predict(noised, sigma, conditioning) - bare).square().mean().item() * len(index)
        return error / len(latents), change / len(latents)

    @torch.no_grad()
    def batch(self, attachment: Attachment, generator: torch.Generator) -> list[Batch]:
        """Inputs of the pools with their targets, one batch for each size of picture, the generic pool's first.

        Empty if there is no pool.  The attachment is left as it was.
        """
        alike: dict[torch.Size, list[int]] = {}
        for number, (latents, *_) in enumerate(self.pools):
            alike.setdefault(latents.shape[1:], []).append(number)
        return [
            self._batch([self.pools[n] for n in numbers], 0 in numbers, attachment, generator) for numbers in alike.values()
        ]

    def _batch(self, pools: list, generic: bool, attachment: Attachment, generator: torch.Generator) -> Batch:
        d, workers = self.denoiser, self.workers
        share = max(1, self.config.replay_batch // len(self.pools))
        latents, prompts = [], []
        for pool, conditioning, _ in pools:
            pick = torch.randint(0, len(pool), (share,), generator=generator)
            latents.append(pool[pick])
            prompts.append(conditioning[pick])
        x, conditioning = torch.cat(latents), Conditioning.cat(prompts)
        sigma = d.draw_sigmas(len(x), generator)
        noised = d.noised(x, torch.randn(x.shape, generator=generator).to(x), sigma)
        whole, bare = len(x), share * sum(from_base for *_, from_base in pools)  # those pools come first
        own, whole_generic = torch.arange(whole)[workers.rows(whole)], share if generic else 0
        if workers.count > 1:
            x, noised, sigma, conditioning = x[own], noised[own], sigma[own], conditioning[own]
        live, frozen = attachment.live, attachment.frozen
        attachment.live = {}
        targets = [torch.empty_like(noised[:0])]
        bare = int((own < bare).sum())
        for part, adapters in ((slice(0, bare), {}), (slice(bare, len(x)), frozen)):
            if part.start < part.stop:
                attachment.frozen = adapters
                targets.append(d.predict(noised[part], sigma[part], conditioning[part]))
        attachment.live, attachment.frozen = live, frozen
        of_generic = int((own < whole_generic).sum())
        return Batch(noised, sigma, conditioning, torch.cat(targets), of_generic, None, whole, whole_generic)
