"""The evaluation protocol: losses on held-out pictures with fixed noise, and what stacking leaves of each concept.

`kept` = (base - stack) / (base - best ordinary LoRA alone), one common denominator for every row.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Adapter, concatenate
from .attach import Attachment, attached
from .denoiser import Conditioning, Denoiser, loss
from .drawing import latents_at_once

LEVELS = 12  # noise levels, evenly spread
REPEATS = 2  # noise samples at each level
LEAST_GAIN = 0.05  # of the bare model's loss
Stack = Callable[[list[int]], Adapter]  # indices of concepts -> those together


@dataclass
class HeldOut:
    """Pictures and prompts that no training saw, with their noise drawn once."""

    latents: Tensor
    conditioning: Conditioning
    noise: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, denoiser: Denoiser, latents: Tensor, captions: list[str], seed: int = 1234, levels: int = 0) -> HeldOut:
        """levels: of noise; 0: LEVELS"""
        levels = levels or LEVELS
        count = len(latents) * levels * REPEATS
        index = torch.arange(len(latents)).repeat_interleave(levels * REPEATS)
        generator = torch.Generator().manual_seed(seed)
        x = latents[index].to(denoiser.device)
        noise = torch.randn(x.shape, generator=generator).to(x)
        sigma = denoiser.even_sigmas(levels).repeat(len(latents) * REPEATS)[:count]
        return cls(x, denoiser.encode_prompts(captions)[index], noise, sigma)


@torch.no_grad()
def held_out_loss(denoiser: Denoiser, held_out: HeldOut, adapter: Adapter | None = None) -> float:
    """Mean loss with the adapter on (or the bare model)."""
    attachment = Attachment()
    attachment.set_frozen(adapter, denoiser.device)
    total, batch = 0.0, 3 * latents_at_once(held_out.latents)
    with attached(denoiser.sites(), attachment):
        for part in torch.arange(len(held_out.latents)).split(batch):
            h = held_out
            total += loss(denoiser, h.latents[part], h.noise[part], h.sigma[part], h.conditioning[part]).item() * len(part)
    return total / len(held_out.latents)


@dataclass
class Losses:
    """One method's losses: per concept alone, in the full stack, in random subsets; on generic prompts and pairs."""

    alone: list[float]
    stack: list[float]
    subset: list[list[float]]
    generic: float
    pairs: float | None


def measure(
    denoiser: Denoiser, alone: list[Adapter], stack: Stack, concepts: list[HeldOut], generic: HeldOut,
    pairs: list[tuple[int, int, HeldOut]] = (), others: int = 2, seed: int = 0, subsets: int | None = None,
    alone_losses: list[float] | None = None,
) -> Losses:  # fmt: skip
    """Losses of adapters, alone and as they stand together.

    others: how many stand beside a concept in the random subsets, three of which are drawn for each of the first `subsets`
    concepts (None: of all).  pairs: (i, j, pictures of both), measured with only those two on.  alone_losses: if they are
    known already.
    """
    count, rng, subset = len(concepts), random.Random(seed), []
    for i, held_out in enumerate(concepts[:subsets]):
        rest = [j for j in range(count) if j != i]
        draws = [sorted([i, *rng.sample(rest, min(others, len(rest)))]) for _ in range(3)]
        subset.append([held_out_loss(denoiser, held_out, stack(members)) for members in draws])
    both = [held_out_loss(denoiser, h, stack([i, j])) for i, j, h in pairs]
    everything = stack(list(range(count)))
    return Losses(
        alone_losses or [held_out_loss(denoiser, h, a) for h, a in zip(concepts, alone)],
        [held_out_loss(denoiser, h, everything) for h in concepts],
        subset,
        held_out_loss(denoiser, generic, everything),
        sum(both) / len(both) if both else None,
    )


def summed(adapters: list[Adapter]) -> Stack:
    """The plain sum of those that are asked for, as `measure` takes it"""
    return lambda members: concatenate([adapters[i] for i in members])


def row(name: str, losses: Losses, base: list[float], best_alone: list[float], base_generic: float) -> dict:
    """One row of a table: the protocol's columns, fractions rather than percent.

    alone_gain and stack_gain: shares of what the ordinary LoRAs gain, of the losses' means; kept_*: concept by concept.  Of
    what is kept no concept counts on which the ordinary LoRA gains less than LEAST_GAIN: a share of next to nothing says
    nothing; `counted` is how many do (all, where none gains as much).
    """
    gain = [b - o for b, o in zip(base, best_alone)]
    counted = [i for i, (b, g) in enumerate(zip(base, gain)) if g >= LEAST_GAIN * b] or list(range(len(base)))
    kept = [(base[i] - losses.stack[i]) / gain[i] for i in counted]
    subset = [(base[i] - s) / gain[i] for i in counted if i < len(losses.subset) for s in losses.subset[i]]
    return {
        "row": name,
        "n": len(base),
        "counted": len(counted),
        "alone": mean(losses.alone),
        "stack": mean(losses.stack),
        "alone_gain": sum(b - a for b, a in zip(base, losses.alone)) / sum(gain),
        "stack_gain": sum(b - s for b, s in zip(base, losses.stack)) / sum(gain),
        "kept_mean": mean(kept),
        "kept_worst": min(kept),
        "kept_subset": mean(subset),
        "generic_drift": losses.generic / base_generic - 1,
        "pairs": losses.pairs,
    }


def mean(values: list[float]) -> float:
    """Of one value at least"""
    return sum(values) / len(values)
