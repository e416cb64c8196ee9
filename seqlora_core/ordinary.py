"""An ordinary LoRA, as everyone trains it: the yardstick of every comparison here, not weakened."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from .adapter import Adapter, LayerDelta, concatenate, is_token_table
from .attach import Attachment, attached
from .composition import compose, gram_schmidt, norm_controlled
from .concept import References
from .denoiser import Denoiser, loss
from .evaluation import Stack
from .optimisers import gradients, schedule
from .statistics import Moments

# row of a table -> ordinary LoRAs together: (adapters, their moments, general moments) to one adapter
Combine = Callable[[list[Adapter], list[Moments], Moments], Adapter]
COMBINED: dict[str, Combine] = {
    "ordinary_sum": lambda a, m, g: concatenate(a),
    "ordinary_norm": lambda a, m, g: concatenate(norm_controlled(a)),
    "ordinary_gram_schmidt": lambda a, m, g: concatenate(gram_schmidt(a)),
    "closed_form": lambda a, m, g: compose(a, mode="data", moments=m, general=g),
}


def combined(combine: Combine, adapters: list[Adapter], moments: list[Moments], general: Moments) -> Stack:
    """Those that are asked for, combined anew, as `evaluation.measure` takes it"""
    return lambda members: combine([adapters[i] for i in members], [moments[i] for i in members], general)


def train_ordinary(
    denoiser: Denoiser,
    references: References,
    rank: int = 4,
    steps: int = 200,
    rate: float = 2e-3,
    batch: int = 8,
    seed: int = 0,
) -> Adapter:
    """AdamW on both factors; lora_down Kaiming-uniform and lora_up zero as in kohya and PEFT, alpha = rank.

    Same layers, data, noise, schedule and number of steps as trainer.fit.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for site in (s for s in denoiser.sites() if not is_token_table(s.name)):
        bound = 1 / math.sqrt(site.in_features)
        down = (torch.rand(rank, site.in_features, generator=generator) * 2 - 1) * bound
        up = torch.zeros(site.out_features, rank)
        factors[site.name] = tuple(t.to(denoiser.device).requires_grad_() for t in (down, up))
    learnt = [t for pair in factors.values() for t in pair]
    optimiser = torch.optim.AdamW(learnt, rate, betas=(0.9, 0.99), weight_decay=1e-2)
    prompts, latents = denoiser.encode_prompts(references.captions), references.latents.to(denoiser.device)
    attachment = Attachment()
    attachment.live = factors
    with attached(denoiser.sites(), attachment):
        for number in range(1, steps + 1):
            optimiser.param_groups[0]["lr"] = rate * schedule(number, steps)
            pick = torch.randint(0, len(latents), (batch,), generator=generator)
            sigma = denoiser.draw_sigmas(batch, generator)
            noise = torch.randn(latents[pick].shape, generator=generator).to(latents)
            error = partial(loss, denoiser, latents[pick], noise, sigma, prompts[pick])
            found = gradients(error, learnt, noise.numel())
            for factor, gradient in zip(learnt, found):
                factor.grad = gradient
            optimiser.step()
    return Adapter({n: LayerDelta(d.detach().cpu(), u.detach().cpu()) for n, (d, u) in factors.items()})
