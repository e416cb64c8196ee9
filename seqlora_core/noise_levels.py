"""Which noise levels a step trains on, and how much each counts."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TrainingConfig
from .denoiser import Denoiser
from .errors import UserError


def draw_sigmas(denoiser: Denoiser, config: TrainingConfig, count: int, generator: torch.Generator) -> Tensor:
    """[count] noise levels: as the family's own training draws them ("model"), or at shares of its schedule that are
    uniform, logit-normal, or uniform and then moved towards noise by config.shift as SD3 does ("shifted")."""
    if config.timesteps == "model":
        return denoiser.draw_sigmas(count, generator)
    if config.timesteps == "logit_normal":
        share = torch.sigmoid(torch.randn(count, generator=generator))
    else:
        share = torch.rand(count, generator=generator)
        if config.timesteps == "shifted":
            share = config.shift * share / (1 + (config.shift - 1) * share)
    return denoiser.sigma_at(share)


def signal_to_noise(denoiser: Denoiser, sigma: Tensor) -> Tensor:
    """Energy of the picture over that of the noise in a noised latent; [n]"""
    one, zero = torch.ones(len(sigma), 1, 1, 1, device=sigma.device), torch.zeros(len(sigma), 1, 1, 1, device=sigma.device)
    signal, noise = denoiser.noised(one, zero, sigma), denoiser.noised(zero, one, sigma)
    return (signal / noise).square().flatten().float()


def min_snr_weights(denoiser: Denoiser, sigma: Tensor, gamma: float) -> Tensor:
    """Weights of the squared error [n]: min(snr, gamma) / snr, or over snr + 1 for velocity models.

    Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (2023).  UserError for flow models, whose
    loss it was not made for.
    """
    prediction = denoiser.about().prediction
    if prediction not in ("epsilon", "v"):
        raise UserError("min_snr is for models that predict noise or velocity, and this one does neither: set it to 0")
    snr = signal_to_noise(denoiser, sigma)
    return snr.clamp(max=gamma) / (snr + 1 if prediction == "v" else snr)
