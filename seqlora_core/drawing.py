"""Pictures that a model draws, and what its layers see meanwhile.

A library's sampler would draw them as well, but not hand out what goes into the model at each step, the same way in every
host; and a pass through the model that only records is saved.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter
from .attach import Attachment, attached
from .denoiser import Denoiser, check_size
from .errors import UserError
from .statistics import Moments, Recorder

# drawn without guidance the pictures are the model's own distribution: its loss on them is as on real pictures that it
# knows, that on guided ones is far higher (docs/RESULTS.md)
UNGUIDED = 1.0
STEPS = 7  # few: a start-up is to stay within a tenth of a run (benchmarks.training)


class Visited(NamedTuple):
    """What a model was asked on the way to pictures, and what it said: x and said [n, steps, ...], sigma [n, steps].

    The way is on the model's own distribution at every noise level (Song et al. 2021, "Score-Based Generative Modeling through
    Stochastic Differential Equations", section 4.3), so that these are what replay asks and its targets, for nothing.
    """

    x: Tensor
    sigma: Tensor
    said: Tensor

    def leads_to(self, latents: Tensor) -> bool:
        """Whether the shapes are those of ways to these pictures"""
        ways = (len(latents), *self.sigma.shape[1:2], *latents.shape[1:])
        return self.sigma.ndim == 2 and self.x.shape == self.said.shape == ways and len(self.sigma) == len(latents)


class Drawn(NamedTuple):
    """latents [n, ...] of pictures, second moments of what each layer was given meanwhile, and what was visited on the way"""

    latents: Tensor
    moments: Moments
    visited: Visited


@torch.no_grad()
def draw(
    denoiser: Denoiser, prompts: list[str], seed: int, size: tuple[int, int], adapter: Adapter | None = None,
    guidance: float = UNGUIDED, steps: int = STEPS,
) -> Drawn:  # fmt: skip
    """Latents drawn for these prompts, with the adapter on or bare, second moments of every site's inputs meanwhile, and the way.

    Each picture is seen at one noise level of each of `steps` parts of the schedule, which are equally likely in training;
    a first step from pure noise, which training never has, is not recorded, nor is what guidance asks about no prompt or adds.
    Deterministic DDIM (Song et al. 2021), which for flow models is Euler's method.  UserError for a size that the model cannot take.
    """
    check_size(denoiser, size)
    generator, count, shape = torch.Generator().manual_seed(seed), len(prompts), denoiser.latent_shape(size)
    levels = denoiser.even_sigmas(count * steps).sort(descending=True).values.view(steps, count)
    dealt = torch.stack([torch.randperm(count, generator=generator) for _ in range(steps)])
    levels = levels.gather(1, dealt.to(levels.device))
    pure = denoiser.sigma_at(torch.ones(1)).to(levels)
    attachment, drawn, visited = Attachment(), [], []
    attachment.set_frozen(adapter, denoiser.device)
    recorder = Recorder(attachment)
    with attached(denoiser.sites(), attachment):
        empty = None if guidance == UNGUIDED else denoiser.encode_prompts([""])
        for rows in torch.arange(count).split(at_once(size)):
            some = [prompts[i] for i in rows]
            wanted = denoiser.encode_prompts(some)
            unwanted = None if empty is None else empty[torch.zeros_like(rows)]
            noise = torch.randn(len(some), *shape, generator=generator).to(denoiser.device)
            latents, on_the_way = torch.zeros_like(noise), []
            for step in range(steps + 1):
                sigma = levels[step - 1, rows] if step else pure.expand(len(some))
                x = denoiser.noised(latents, noise, sigma)
                with recorder if step else contextlib.nullcontext():
                    prediction = denoiser.predict(x, sigma, wanted)
                if step:
                    on_the_way.append((x.float().cpu(), prediction.float().cpu()))
                if unwanted is not None:
                    other = denoiser.predict(x, sigma, unwanted)
                    prediction = other + guidance * (prediction - other)
                latents, noise = foreseen(denoiser, x.float(), prediction.float(), sigma)
            if not latents.isfinite().all():
                raise UserError(
                    "what the model draws is not finite: load it in a wider precision, such as float32, or leave out the LoRA that "
                    "makes it so"
                )
            drawn.append(latents.cpu())
            visited.append([torch.stack(part, 1) for part in zip(*on_the_way)])
    x, said = (torch.cat(part) for part in zip(*visited))
    return Drawn(torch.cat(drawn), recorder.moments(), Visited(_half(x), levels.T.float().cpu(), _half(said)))


def _half(tensor: Tensor) -> Tensor:
    """In half the room: what rounding changes is far less than what a concept may; as it is where that would not be finite"""
    found = tensor.half()
    return found if found.isfinite().all() else tensor


def foreseen(denoiser: Denoiser, x: Tensor, prediction: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(latents, noise) that make x at this noise level and have this prediction as their target; both are linear in them"""
    one = torch.ones(len(x), *[1] * (x.ndim - 1), device=x.device)
    zero = torch.zeros_like(one)
    a, b = denoiser.noised(one, zero, sigma).float(), denoiser.noised(zero, one, sigma).float()
    c, d = denoiser.target(one, zero, sigma).float(), denoiser.target(zero, one, sigma).float()
    scale = a * d - b * c
    return (d * x - b * prediction) / scale, (a * prediction - c * x) / scale


def at_once(size: tuple[int, int]) -> int:
    """Pictures that go through the model together: few of large ones, so that a start takes no more memory than a step"""
    return 32 if max(size) <= 128 else 4


def latents_at_once(latents: Tensor) -> int:
    """The same of latents [n, ..., height, width], by the size that their pictures have with most models"""
    return at_once((8 * latents.shape[-2], 8 * latents.shape[-1]))
