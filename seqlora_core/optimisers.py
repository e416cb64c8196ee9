"""Gradients of an objective, the optimiser of lora_up and the course of the learning rate, all from libraries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from .errors import UserError

OPTIMISERS = ("adam", "adamw", "sgd", "rmsprop", "prodigy", "adam8bit", "adamw8bit")
SCHEDULES = ("half", "constant", "linear", "cosine", "polynomial")
BETAS = (0.9, 0.99)


def gradients(value: Callable[[], Tensor], factors: list[Tensor], elements: int) -> list[Tensor | None]:
    """Of `value()`, a mean over so many elements, in each of the factors; None for one that it does not depend on.

    What each element of a mean passes back is so small that a model in float16 would round it away (Micikevicius et al., "Mixed
    Precision Training", 2018): they are taken of a multiple of it, or of a smaller one where that overflows.  Of powers of two,
    which change no bit in float32.
    """
    scale = 2.0 ** max(0, elements.bit_length() - 5)
    while True:
        whole = value()
        found = [None if g is None else g / scale for g in torch.autograd.grad(whole * scale, factors, allow_unused=True)]
        finite = [whole.isfinite(), *(g.isfinite().all() for g in found if g is not None)]
        if scale == 1 or torch.stack(finite).all() or not finite[0]:  # one wait for the device in the usual case
            return found
        scale = max(1.0, scale / 16)


def make_optimiser(name: str, parameters: list[Tensor], rate: float, decay: float = 0.0) -> torch.optim.Optimizer:
    """decay: weight decay.  UserError for an unknown name and for a package that is not installed."""
    if name == "adam":
        return torch.optim.Adam(parameters, rate, betas=BETAS, weight_decay=decay)
    if name == "adamw":
        return torch.optim.AdamW(parameters, rate, betas=BETAS, weight_decay=decay)
    if name == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=BETAS[0], weight_decay=decay)
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, rate, alpha=BETAS[1], weight_decay=decay)
    try:
        if name == "prodigy":
            from prodigyopt import Prodigy

            return Prodigy(parameters, rate, betas=BETAS, weight_decay=decay, safeguard_warmup=True, use_bias_correction=True)
        if name in ("adam8bit", "adamw8bit"):
            from bitsandbytes import optim

            kind = optim.Adam8bit if name == "adam8bit" else optim.AdamW8bit
            return kind(parameters, rate, betas=BETAS, weight_decay=decay)
    except ImportError as error:
        package = "prodigyopt" if name == "prodigy" else "bitsandbytes"
        raise UserError(f"the optimiser {name!r} needs the package {package}: install it, or use 'adamw'") from error
    raise UserError(f"unknown optimiser {name!r}: use one of {', '.join(OPTIMISERS)}")


def schedule(number: int, total: int) -> float:
    """Share of the learning rate at step `number` (from 1): whole for the first half, then linearly to zero."""
    return min(1.0, 2 * (1 - (number - 1) / total))


def course(name: str, steps: int, warmup: int = 0) -> list[float]:
    """Share of the learning rate at each of `steps` steps: `warmup` steps of linear rise, then torch's schedule of this name.

    Worked out beforehand, so that a resumed run has nothing to remember of it.
    """
    rest, dummy = steps - warmup, torch.optim.SGD([torch.zeros(1)], lr=1.0)
    if name == "half":
        scheduler = lr_scheduler.LambdaLR(dummy, lambda n: schedule(n + 1, rest))
    elif name == "constant":
        scheduler = lr_scheduler.ConstantLR(dummy, 1.0)
    elif name == "linear":
        scheduler = lr_scheduler.LinearLR(dummy, 1.0, 0.0, rest)
    elif name == "cosine":
        scheduler = lr_scheduler.CosineAnnealingLR(dummy, rest)
    else:
        scheduler = lr_scheduler.PolynomialLR(dummy, rest, power=2.0)
    shares = [(n + 1) / (warmup + 1) for n in range(warmup)]
    for _ in range(rest):
        shares.append(dummy.param_groups[0]["lr"])
        dummy.step()
        scheduler.step()
    return shares
