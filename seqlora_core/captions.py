"""Captions while training: encoded once, in several orders of their tags, and now and then left out."""

from __future__ import annotations

import random
import re

import torch
from torch import Tensor

from .config import TrainingConfig
from .denoiser import Conditioning, Denoiser
from .prompts import as_a_word, calls, without

ORDERS = 8  # of a caption's tags, when they are shuffled
EARLY = 16  # bytes of a caption, after which every text encoder reads on: a token is a byte at least


def shuffled(caption: str, trigger: str, count: int, rng: random.Random) -> list[str]:
    """The caption, and count - 1 others with its comma-separated tags in other orders; those with the trigger stay first."""
    whole = as_a_word(trigger).pattern  # a comma of the trigger's own parts nothing
    parts = re.findall(rf"(?:{whole}|[^,])+", caption, re.IGNORECASE)
    tags = [tag.strip() for tag in parts if tag.strip()]
    first = [tag for tag in tags if calls(trigger, tag)]
    rest = [tag for tag in tags if tag not in first]
    return [caption, *(", ".join(first + rng.sample(rest, len(rest))) for _ in range(count - 1))]


@torch.no_grad()
def unread(denoiser: Denoiser, captions: list[str], trigger: str) -> list[int]:
    """Which captions are cut off by the text encoder before their trigger: without it they are encoded just the same"""

    def late(caption: str) -> bool:
        found = as_a_word(trigger).search(caption)
        return found is None or len(caption[: found.start()].encode(errors="replace")) > EARLY

    def unchanged(caption: str) -> bool:  # each by itself: within a batch sums are rounded in other orders
        return torch.equal(*(denoiser.read_prompts([text]).context for text in (caption, without(trigger, caption))))

    return [i for i, caption in enumerate(captions) if late(caption) and unchanged(caption)]


class Prompts:
    """A concept's captions, encoded.  plain: as they are, one for each picture."""

    def __init__(self, denoiser: Denoiser, captions: list[str], trigger: str, config: TrainingConfig):
        self.orders, self.dropout, rng = (
            ORDERS if config.shuffle_tags else 1,
            config.caption_dropout,
            random.Random(config.seed),
        )
        texts = [t for c in captions for t in shuffled(c, trigger, self.orders, rng)] if config.shuffle_tags else captions
        self.count = len(texts)
        self.encoded: Conditioning = denoiser.encode_prompts([*texts, ""] if self.dropout else texts)
        self.plain = self.encoded[torch.arange(0, self.count, self.orders)]

    def draw(self, pick: Tensor, generator: torch.Generator) -> Conditioning:
        """Captions of these pictures, in a random order of tags, each left out with probability `dropout`"""
        index = pick
        if self.orders > 1:
            index = pick * self.orders + torch.randint(0, self.orders, pick.shape, generator=generator)
        if self.dropout:
            index = torch.where(torch.rand(pick.shape, generator=generator) < self.dropout, self.count, index)
        return self.encoded[index]
