"""What a fit starts from and what it leaves: reference pictures, and a trained concept."""

from __future__ import annotations

from dataclasses import dataclass

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
    """latents [n, ...] of the reference pictures, one caption each."""

    latents: Tensor
    captions: list[str]
    size: tuple[int, int]  # of the pictures, pixels
