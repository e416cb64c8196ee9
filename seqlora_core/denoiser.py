"""What the method needs of a diffusion model: one Protocol, implemented once per host."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attach import Site
from .metadata import Base


@dataclass
class Conditioning:
    """Encoded prompts, indexable like a batch.

    context [n, tokens, width]; pooled [n, width] or None.  lengths: tokens of each prompt, those after them are
    padding; None if all count.  more: what else a family's text encoder hands to its model (masks, a second text), of
    each prompt and as it is encoded by itself; None if nothing.
    """

    context: Tensor
    pooled: Tensor | None = None
    lengths: list[int] | None = None
    more: list[dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        rows = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        return Conditioning(
            self.context[index],
            None if self.pooled is None else self.pooled[index],
            None if self.lengths is None else [self.lengths[i] for i in rows],
            None if self.more is None else [self.more[i] for i in rows],
        )

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        """One batch of several.

        Contexts of unequal lengths are padded where the lengths are kept; else they are repeated to a common one, as
        ComfyUI does for UNets: attention over repeated tokens is attention over the tokens.
        """
        first, sizes = parts[0], [p.context.shape[1] for p in parts]
        if first.lengths is not None:
            context = torch.cat([F.pad(p.context, (0, 0, 0, max(sizes) - n)) for p, n in zip(parts, sizes)])
        else:
            length = math.lcm(*sizes)
            context = torch.cat([p.context.repeat(1, length // n, 1) for p, n in zip(parts, sizes)])
        return Conditioning(
            context,
            None if first.pooled is None else torch.cat([p.pooled for p in parts]),
            None if first.lengths is None else [n for p in parts for n in p.lengths],
            None if first.more is None else [m for p in parts for m in p.more],
        )


class Denoiser(Protocol):
    """A frozen model with adaptable layers.

    `predict` and `target` are in the model's native error units (noise, velocity ...), so that the training loss
    is always the plain mean squared difference.
    """

    device: torch.device

    def sites(self) -> list[Site]:
        """The adaptable layers, in the order of the forward pass."""

    def text_sites(self) -> list[Site]:
        """Layers of the text encoders whose inputs are to be recorded while prompts are encoded"""

    def encode_prompts(self, prompts: list[str]) -> Conditioning: ...

    def encode_images(self, images: Tensor) -> Tensor:
        """[n, height, width, 3] in 0..1 -> latents"""

    def decode(self, latents: Tensor) -> Tensor:
        """latents -> [n, height, width, 3] in 0..1"""

    def draw_sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels for training, [count]"""

    def sigma_at(self, share: Tensor) -> Tensor:
        """Noise levels at these shares of the schedule, from 0 (picture) to 1 (noise)"""

    def even_sigmas(self, count: int) -> Tensor:
        """Noise levels evenly spread over the same range, [count]: for statistics and evaluation"""

    def noised(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor: ...

    def predict(self, noised: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor: ...

    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor: ...

    def sample(self, conditioning: Conditioning, seed: int, steps: int, guidance: float, size: tuple[int, int]) -> Tensor:
        """Latents drawn for each prompt; the i-th from seed + i.  size: height and width in pixels."""

    def fingerprint(self) -> str:
        """Names the base model: a library belongs to one."""

    def network(self) -> nn.Module:
        """The denoising network, whose blocks gradient checkpointing runs twice"""

    def about(self) -> Base:
        """What a LoRA file says of the model it was trained on"""


class FlowMatching:
    """Noising and target of models that predict a velocity on straight paths (SD3)."""

    def text_sites(self) -> list[Site]:
        return []

    def noised(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise - latents


def loss(denoiser: Denoiser, latents: Tensor, noise: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
    """Mean squared error of the prediction in native units; scalar."""
    prediction = denoiser.predict(denoiser.noised(latents, noise, sigma), sigma, conditioning)
    return (prediction - denoiser.target(latents, noise, sigma)).square().mean()


def fingerprint(sites: list[Site]) -> str:
    """Names a base model by its adapted layers and one of their weights, in fp16: the same on every host."""
    shapes = sorted((s.name, s.in_features, s.out_features) for s in sites)
    first = min(sites, key=lambda s: s.name)
    weight = torch.cat([m.weight.detach() for m in first.modules]).cpu().half().contiguous()
    return hashlib.sha256(repr(shapes).encode() + weight.numpy().tobytes()).hexdigest()[:16]
