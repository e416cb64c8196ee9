"""What a fit starts from and what it leaves: reference pictures, and a trained concept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import Adapter
from .statistics import Moments


@dataclass
class Concept:
    """A trained concept: an ordinary LoRA, and what later concepts need to know of it.

    bases: layer -> [d, r] in the library's whitened coordinates; latents [n, ...] and captions: references kept
    for replay (may be empty).  moments: None of a LoRA that was not calibrated.
    """

    name: str
    trigger: str
    class_noun: str
    adapter: Adapter
    moments: Moments | None
    bases: dict[str, Tensor]
    latents: Tensor
    captions: list[str]


@dataclass
class References:
    """latents [n, ...] of reference pictures of one size, one caption each.

    masks [n, height, width] in 0..1: how much each pixel's error counts; None for all alike.  repeats: how often each
    picture is taken for every time that one without repeats is; None for all alike.  mirrored: each picture is followed by
    its mirror image.
    """

    latents: Tensor
    captions: list[str]
    size: tuple[int, int]  # of the pictures: height, width, pixels
    masks: Tensor | None = None
    repeats: list[int] | None = None
    mirrored: bool = False

    def known(self) -> Tensor:
        """Numbers of the pictures to draw from, each as often as its repeats say"""
        numbers = torch.arange(len(self.latents))
        return numbers.repeat_interleave(torch.tensor(self.repeats or [1] * len(numbers)))


def merged(sets: list[References]) -> References:
    """The first set's pictures with the captions of all: what prompts of the concept look like"""
    return replace(sets[0], captions=[c for s in sets for c in s.captions])


def latent_weights(masks: Tensor, latents: Tensor) -> Tensor:
    """Masks of pictures [n, height, width] in 0..1 as weights of their latents' errors, mean 1 for each picture"""
    small = F.interpolate(masks[:, None].float(), latents.shape[-2:], mode="area")
    small = small / small.mean((1, 2, 3), keepdim=True).clamp_min(1e-6)
    return small.view(len(small), *[1] * (latents.ndim - 3), *latents.shape[-2:])
