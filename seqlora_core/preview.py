"""Pictures drawn with adapters on: previews while training, and the sheet after it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import Adapter, concatenate, is_token_table
from .attach import Attachment, attached
from .concept import Concept
from .denoiser import Denoiser
from .labelled import labelled_grid
from .library import Library
from .live_prompts import is_text
from .same_layers import under_names

STEPS, GUIDANCE, SEED = 20, 4.0, 7
PREVIEW_TILE, SMALLEST_TILE = 200, 128  # pixels a picture gets in the preview, and at least in the sheet
UNRELATED = "a castle, blue background"


def let_texts_act(denoiser: Denoiser, adapters: list[Adapter]) -> None:
    """Those layers of the denoiser's text encoders that the adapters move are among its sites from here on"""
    text = [layer for a in adapters for layer in a.layers if is_text(layer)]
    denoiser.adapt_text(not all(map(is_token_table, text)), any(map(is_token_table, text)))


def acting(denoiser: Denoiser, adapters: list[Adapter]) -> list[Adapter]:
    """The adapters under the names of the denoiser's layers, those of its text encoders among them"""
    let_texts_act(denoiser, adapters)
    names = [s.name for s in denoiser.sites()]
    return [under_names(a, names) for a in adapters]


@torch.no_grad()
def draw_with(
    denoiser: Denoiser, adapter: Adapter | None, prompts: list[str], size: tuple[int, int], seed: int = SEED, steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Tensor:  # fmt: skip
    """[n, height, width, 3] in 0..1: each prompt drawn with the adapter on, the i-th from seed + i."""
    attachment = Attachment()
    attachment.set_frozen(adapter, denoiser.device)
    conditioning = denoiser.encode_prompts(prompts)
    with attached(denoiser.sites(), attachment):
        latents = denoiser.sample(conditioning, seed, steps, guidance, size)
    return denoiser.decode(latents).cpu()


class Preview:
    """The same three things with the same seeds, again and again while a concept is trained: the concept, one of those
    before it, and something that no concept has to do with.  All concepts are on, so forgetting shows as it happens.

    failed: why the last one could not be drawn, "" if it could.
    """

    def __init__(self, denoiser: Denoiser, trigger: str, class_noun: str, earlier: list[Concept], size: tuple[int, int]):
        self.denoiser, self.size = denoiser, size
        self.heads, self.prompts = ["the new concept"], [f"a {trigger} {class_noun}".strip()]
        for concept in earlier[:1]:
            self.heads.append(f"earlier: {concept.name}")
            self.prompts.append(f"a {concept.trigger} {concept.class_noun}".strip())
        self.heads.append("unrelated")
        self.prompts.append(UNRELATED)
        self.adapters = [c.adapter for c in earlier]
        self.before: Tensor | None = None
        self.failed = ""

    def draw(self, name: str, adapter: Adapter):
        """PIL image: a row from before this concept, and one of now, called `name`; adapter: the concept as it is now.

        One that cannot be drawn, as for want of memory, is white: it ends no run.
        """
        self.failed = ""
        try:
            if self.before is None:
                self.before = self._row(self.adapters)
            both = self.before, self._row([*self.adapters, adapter])
        except (RuntimeError, MemoryError) as error:
            self.failed = f"the preview of {name} could not be drawn: {(str(error) or 'out of memory').splitlines()[0]}"
            white = torch.ones(1, *self.size, 3)
            return labelled_grid([[white] * len(self.heads)], [f"{name}:\nnot drawn"], self.heads, PREVIEW_TILE)
        return labelled_grid([[p[None] for p in row] for row in both], ["before", name], self.heads, PREVIEW_TILE)

    def _row(self, adapters: list[Adapter]) -> Tensor:
        return draw_with(self.denoiser, concatenate(adapters) if adapters else None, self.prompts, self.size)


def sample_sheet(denoiser: Denoiser, library: Library, name: str, references: Tensor, count: int = 4) -> Tensor:
    """[1, height, width, 3], a row each: references, the concept alone, and the concept within the whole library."""
    concept, concepts = library.load(name), library.concepts(stored_moments=True)
    alone, *everything = acting(denoiser, [concept.adapter, *(c.adapter for c in concepts)])
    prompts = [f"a {concept.trigger} {concept.class_noun}".strip()] * count
    first = references[:count].cpu()
    rows = [F.pad(first, (0, 0) * 3 + (0, count - len(first)), value=1.0)]
    size = tuple(references.shape[1:3])
    rows.append(draw_with(denoiser, alone, prompts, size))
    rows.append(rows[-1] if len(everything) == 1 else draw_with(denoiser, concatenate(everything), prompts, size))
    names = ["references", "alone", "alone in its library" if len(everything) == 1 else f"all {len(everything)} on"]
    tile = max(SMALLEST_TILE, references.shape[2])
    sheet = labelled_grid([[row] for row in rows], names, [f"{name}: {prompts[0]}"], tile)
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]
