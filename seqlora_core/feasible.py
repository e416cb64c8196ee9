"""Whether a fit can be made at all: what its options ask for, known before any work."""

from __future__ import annotations

import torch

from .adapter import is_token_table
from .config import TrainingConfig
from .denoiser import Denoiser
from .errors import UserError
from .noise_levels import min_snr_weights
from .optimisers import make_optimiser
from .parallel import Workers
from .selection import acts

EXAMPLES = 3  # layers named to who asks for others


def check_feasible(denoiser: Denoiser, config: TrainingConfig, workers: Workers | None = None) -> None:
    """UserError for options that are wrong in themselves, need a package that is not there, or do not fit this
    model, whose text encoder is adapted as they ask (`Denoiser.adapt_text`)."""
    config.validate()
    (workers or Workers()).check(config)
    make_optimiser(config.optimiser, [torch.zeros(1, requires_grad=True)], config.learning_rate)
    if config.min_snr:
        min_snr_weights(denoiser, denoiser.even_sigmas(1), config.min_snr)
    names = [s.name for s in denoiser.sites()]
    if not any(acts(name, config.layers) for name in names):
        plain = [n for n in names if not is_token_table(n)]
        some = ", ".join([*plain[:EXAMPLES], *(["..."] if len(plain) > EXAMPLES else [])])
        raise UserError(f"no layer of this model is named by layers {config.layers!r}: its layers are such as {some}")
