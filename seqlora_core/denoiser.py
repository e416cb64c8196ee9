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
from .errors import UserError
from .metadata import Base

SAMPLING_SHIFT = 3.0  # of the schedule: SD3's own


AT_ONCE = 32  # prompts in a text encoder, which keeps the states of all its layers until it is done


def a_few(prompts: list[str]) -> list[list[str]]:
    """Prompts as many at a time as a text encoder is given"""
    return [prompts[i : i + AT_ONCE] for i in range(0, max(1, len(prompts)), AT_ONCE)]


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
    pixel_step: int  # sides of pictures are multiples of it
    largest_side: int  # of a picture, pixels; 0: any

    def sites(self) -> list[Site]:
        """The adaptable layers, in the order of the forward pass."""

    def text_sites(self) -> list[Site]:
        """Layers of the text encoders whose inputs are to be recorded while prompts are encoded"""

    def adapt_text(self, attention: bool, tokens: bool = False) -> None:
        """Whether the text encoders' attention, and their token tables, are among the sites; prompts encoded before know
        nothing of it.  UserError if what is wanted cannot be."""

    def token_tables(self) -> list[Site]:
        """Of the text encoders"""

    def read_prompts(self, prompts: list[str]) -> Conditioning:
        """Encoded now, whatever is adapted; differentiable wherever gradients are on"""

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """The same without gradients; with adapted text encoders it stands for the prompts until `predict` encodes them anew"""

    def encode_images(self, images: Tensor) -> Tensor:
        """[n, height, width, 3] in 0..1 -> latents"""

    def decode(self, latents: Tensor) -> Tensor:
        """latents -> [n, height, width, 3] in 0..1"""

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Of one picture's latents; size: height and width in pixels"""

    def draw_sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels for training, [count]"""

    def sigma_at(self, share: Tensor) -> Tensor:
        """Noise levels at these shares of the schedule, from 0 (picture) to 1 (noise)"""

    def even_sigmas(self, count: int) -> Tensor:
        """Noise levels evenly spread over the same range, [count]: for statistics and evaluation"""

    def noised(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Latents [n, ...] with as much of the noise as the levels [n] say; linear in both"""

    def predict(self, noised: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """What the model foresees of the target, [n, ...]; differentiable in what is attached, wherever gradients are on"""

    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What `predict` should give for these latents and this noise, [n, ...]; linear in both"""

    def sample(self, conditioning: Conditioning, seed: int, steps: int, guidance: float, size: tuple[int, int]) -> Tensor:
        """Latents drawn for each prompt; the i-th from seed + i.  size: height and width in pixels."""

    def fingerprint(self) -> str:
        """Names the base model: a library belongs to one."""

    def network(self) -> nn.Module:
        """The denoising network, whose blocks gradient checkpointing runs twice"""

    def about(self) -> Base:
        """What a LoRA file says of the model it was trained on"""


class FlowMatching:
    """Noising, target and sampling of models that predict a velocity on straight paths (SD3).

    `latent_shape` gives the latents' [channels, height, width] for a size in pixels, `size` is the side the model draws.
    """

    size: int
    pixel_step, largest_side = 1, 0
    training_shift = 1.5
    dtype = torch.float32  # of latents and noise levels, whatever the weights are

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        raise NotImplementedError

    def text_sites(self) -> list[Site]:
        return []

    def token_tables(self) -> list[Site]:
        return []

    def noised(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return noise - latents

    def draw_sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        """Logit-normal, shifted, as in base training"""
        return _shifted(torch.sigmoid(torch.randn(count, generator=generator)), self.training_shift).to(self.device)

    def sigma_at(self, share: Tensor) -> Tensor:
        return share.to(self.device)

    def even_sigmas(self, count: int) -> Tensor:
        middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return _shifted(torch.sigmoid(torch.special.ndtri(middle)), self.training_shift).to(self.device, self.dtype)

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        seed: int,
        steps: int = 20,
        guidance: float = 3.0,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        from diffusers import FlowMatchEulerDiscreteScheduler

        count, shape = len(conditioning), self.latent_shape(size or (self.size, self.size))
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
        x = torch.stack(noise).to(self.device, self.dtype)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SAMPLING_SHIFT)
        scheduler.set_timesteps(steps, device=self.device)
        if guidance != 1.0:
            empty = self.encode_prompts([""] * count)
            conditioning = Conditioning.cat([conditioning, empty])
        for t in scheduler.timesteps:
            sigma = (t / 1000).to(self.dtype).expand(len(conditioning))
            if guidance == 1.0:
                v = self.predict(x, sigma, conditioning)
            else:
                wanted, unwanted = self.predict(torch.cat([x, x]), sigma, conditioning).chunk(2)
                v = unwanted + guidance * (wanted - unwanted)
            x = scheduler.step(v, t, x, return_dict=False)[0]
        return x


def check_size(denoiser: Denoiser, size: tuple[int, int]) -> None:
    """UserError for pictures of a size that the model cannot take; size: height and width in pixels"""
    step, most = denoiser.pixel_step, denoiser.largest_side
    if any(n % step for n in size) or most and max(size) > most:
        wanted = [f"that are multiples of {step}"] * (step > 1) + [f"of at most {most}"] * bool(most)
        raise UserError(f"pictures of {size[1]} x {size[0]} pixels do not fit this model: choose sides {' and '.join(wanted)}")


def loss(denoiser: Denoiser, latents: Tensor, noise: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
    """Mean squared error of the prediction in native units; scalar."""
    prediction = denoiser.predict(denoiser.noised(latents, noise, sigma), sigma, conditioning)
    return (prediction - denoiser.target(latents, noise, sigma)).square().mean()


def first_site(sites: list[Site]) -> Site:
    """The one whose weight a fingerprint is of"""
    return min(sites, key=lambda s: s.name)


def fingerprint(sites: list[Site], weights: list[Tensor] | None = None) -> str:
    """Names a base model by its adapted layers and one of their weights, in fp16: the same on every host.

    weights: of the modules of `first_site`, if not what they hold now.
    """
    shapes = sorted((s.name, s.in_features, s.out_features) for s in sites)
    weights = [m.weight for m in first_site(sites).modules] if weights is None else weights
    weight = torch.cat([w.detach() for w in weights]).cpu().half().contiguous()
    return hashlib.sha256(repr(shapes).encode() + weight.numpy().tobytes()).hexdigest()[:16]


def _shifted(sigma: Tensor, shift: float) -> Tensor:
    """SD3's timestep shift: s t / (1 + (s - 1) t)"""
    return shift * sigma / (1 + (shift - 1) * sigma)
