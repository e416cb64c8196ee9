"""Pictures drawn with adapters on: previews while training, and the sheet after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import Adapter, concatenate
from .attach import Attachment, attached
from .denoiser import Denoiser
from .library import Library

STEPS, GUIDANCE, SEED = 20, 4.0, 7
UNRELATED = "a castle, blue background"


def preview_prompts(trigger: str, class_noun: str) -> list[str]:
    """The new concept, and something else: forgetting shows as it happens."""
    return [f"a {trigger} {class_noun}".strip(), UNRELATED]


@torch.no_grad()
def draw_with(
    denoiser: Denoiser, adapter: Adapter | None, prompts: list[str], size: tuple[int, int], seed: int = SEED
) -> Tensor:
    """[n, height, width, 3] in 0..1: each prompt drawn with the adapter on, the i-th from seed + i."""
    attachment = Attachment()
    attachment.set_frozen(adapter, denoiser.device)
    conditioning = denoiser.encode_prompts(prompts)
    with attached(denoiser.sites(), attachment):
        latents = denoiser.sample(conditioning, seed, STEPS, GUIDANCE, size)
    return denoiser.decode(latents).cpu()


def sample_sheet(denoiser: Denoiser, library: Library, name: str, references: Tensor, count: int = 4) -> Tensor:
    """[1, 3 height, count width, 3]: references, the concept alone, and the concept within the whole library."""
    concept = library.load(name)
    size = tuple(references.shape[1:3])
    prompts = [f"a {concept.trigger} {concept.class_noun}".strip()] * count
    rows = [references[:count].cpu()]
    if len(references) < count:
        rows = [F.pad(references.cpu(), (0, 0) * 3 + (0, count - len(references)), value=1.0)]
    for adapter in (concept.adapter, concatenate([c.adapter for c in library.concepts()])):
        rows.append(draw_with(denoiser, adapter, prompts, size))
    return torch.cat([torch.cat(list(row), 1) for row in rows])[None]
