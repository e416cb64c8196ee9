"""A denoiser of three small layers behind the real protocol: the whole of training runs on it in milliseconds."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from seqlora_core.attach import Site
from seqlora_core.calibration import calibrate
from seqlora_core.config import Checkpointing, TrainingConfig
from seqlora_core.denoiser import Conditioning, FlowMatching, fingerprint
from seqlora_core.library import Library
from seqlora_core.metadata import Base
from seqlora_core.teach import train_concept

WIDTH, CHANNELS, TOKENS = 24, 4, 6
SIZE = (16, 16)


class ToyDenoiser(FlowMatching):
    """Latents [n, 4, 2, 2]; flow matching, as SD3."""

    def __init__(self):
        torch.manual_seed(0)
        self.device = torch.device("cpu")
        self.enter, self.leave = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        for module in (self.enter, self.leave, self.layers):
            module.requires_grad_(False)

    def text_sites(self) -> list[Site]:
        return []

    def adapt_text(self, attention: bool, tokens: bool = False) -> None:
        assert not attention and not tokens

    def read_prompts(self, prompts: list[str]) -> Conditioning:
        return self.encode_prompts(prompts)

    def sites(self) -> list[Site]:
        return [Site(f"diffusion_model.layers.{i}.attn", (m,), WIDTH, WIDTH) for i, m in enumerate(self.layers)]

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        rows = torch.zeros(len(prompts), TOKENS, WIDTH)
        for row, prompt in zip(rows, prompts):
            for i, word in enumerate(prompt.split()[:TOKENS]):
                row[i] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
        return Conditioning(rows)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return CHANNELS, 2, 2

    def encode_images(self, images: Tensor) -> Tensor:
        small = nn.functional.adaptive_avg_pool2d(images.movedim(-1, 1), 2) * 4 - 2
        return torch.cat([small, small.mean(1, keepdim=True)], 1)

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate((latents[:, :3] + 2) / 4, SIZE).movedim(1, -1).clamp(0, 1)

    def draw_sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        return 0.02 + 0.96 * torch.rand(count, generator=generator)

    def even_sigmas(self, count: int) -> Tensor:
        return torch.linspace(0.02, 0.98, count)

    def predict(self, noised: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        tokens = self.enter(noised.flatten(2).mT) + conditioning.context.mean(1, keepdim=True) + sigma.view(-1, 1, 1)
        for layer in self.layers:
            tokens = tokens + torch.tanh(layer(tokens))
        return self.leave(tokens).mT.reshape(noised.shape)

    @torch.no_grad()
    def sample(self, conditioning: Conditioning, seed: int, steps: int, guidance: float, size: tuple[int, int]) -> Tensor:
        draws = [
            torch.randn(CHANNELS, 2, 2, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(conditioning))
        ]
        x = torch.stack(draws)
        for step in range(steps):
            x = x - self.predict(x, torch.full((len(x),), 1 - step / steps), conditioning) / steps
        return x

    def fingerprint(self) -> str:
        return fingerprint(self.sites())

    def about(self) -> Base:
        return Base("toy", "toy")


def start(folder: Path, model: ToyDenoiser, planned: int = 8) -> Library:
    """A new library with its calibration"""
    library = Library(folder, model.fingerprint(), planned, create=True)
    if library.calibration() is None:
        library.keep_calibration(calibrate(model, SIZE, 8))
    return library


def teach(model: ToyDenoiser, library: Library, name: str, seed: int = 0, steps: int = 4, **options):
    """Train a concept of four random pictures; options go to train_concept, `every` and `resume` to its checkpoints."""
    images = torch.rand(4, *SIZE, 3, generator=torch.Generator().manual_seed(seed))
    config = TrainingConfig(rank=2, steps=steps, batch=2, replay_batch=2, seed=seed)
    checkpointing = Checkpointing(every=options.pop("every", 0), resume=options.pop("resume", True))
    return train_concept(
        model, library, images, name, f"{name}zx", "thing", config=config, checkpointing=checkpointing, **options
    )  # fmt: skip
