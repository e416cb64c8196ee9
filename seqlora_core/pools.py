"""Pictures to replay, and what a model is asked about them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .concept import References, latent_weights
from .denoiser import Conditioning, Denoiser
from .drawing import Visited


class Asked(NamedTuple):
    """Inputs of the denoiser.  weight: of the squared errors, None for all alike.  said: what the bare base model predicted
    for them, None if that is yet to be asked."""

    noised: Tensor
    sigma: Tensor
    conditioning: Conditioning
    weight: Tensor | None
    said: Tensor | None


class Pool:
    """Pictures of one size to draw from.

    from_base: whether what the bare base model predicts is the target.  With what it `visited` when it drew them, that is what
    is asked, and known already; else the pictures are noised anew each time.
    """

    def __init__(
        self, denoiser: Denoiser, latents: Tensor, prompts: list[str], from_base: bool, given: References | None = None,
        visited: Visited | None = None,
    ):  # fmt: skip
        """given: where pictures have repeats and masks"""
        self.denoiser, self.texts, self.from_base = denoiser, prompts, from_base
        self.latents, self.prompts = latents.to(denoiser.device), denoiser.encode_prompts(prompts)
        self.known = given.known() if given else torch.arange(len(latents))  # their numbers, each as often as it is taken
        masked = given is not None and given.masks is not None
        self.weights = latent_weights(given.masks, latents).to(denoiser.device) if masked else None
        self.visited = visited if from_base else None

    def ask(self, count: int, generator: torch.Generator) -> Asked:
        """About `count` of them, drawn at random"""
        pick = self.known[torch.randint(0, len(self.known), (count,), generator=generator)]
        weight = None if self.weights is None else self.weights[pick]
        if self.visited is not None:
            step = torch.randint(0, self.visited.sigma.shape[1], (count,), generator=generator)
            noised, sigma, said = (part[pick, step].to(self.latents) for part in self.visited)
            return Asked(noised, sigma, self.prompts[pick], weight, said)
        x, sigma = self.latents[pick], self.denoiser.draw_sigmas(count, generator)
        noise = torch.randn(x.shape, generator=generator).to(x)
        return Asked(self.denoiser.noised(x, noise, sigma), sigma, self.prompts[pick], weight, None)
