"""Identity of what is drawn: the held-out judge's cosine with held-out pictures, beside the pixel control."""

from __future__ import annotations

import torch
from torch import Tensor

from .adapter import Adapter
from .evaluation import mean
from .judge import Judge, nearest, pixels, similarity
from .preview import draw_with

COLOURS = ("white", "gray", "blue", "yellow", "green", "pink")


class Identity:
    """Scores of several subjects; all rows of a table are drawn with the same seeds.

    model: a denoiser with a `size`.  subjects: with `name`, `held_out_images` [n, h, w, 3] and `prompt(colour)`.
    bank [m, h, w, 3]: pictures on whose mean features are centred.  Raises ImportError if the judge's packages are missing.
    """

    def __init__(self, model, subjects, bank: Tensor, drawn: int = len(COLOURS)):
        self.model, self.subjects, self.drawn = model, subjects, drawn
        self.judge = Judge()
        self.kinds = {"identity": self.judge.features, "pixel_control": pixels}
        self.centres = {k: f(bank).mean(0) for k, f in self.kinds.items()}
        self.references = {k: [f(s.held_out_images) for s in subjects] for k, f in self.kinds.items()}

    def scores(self, adapters: list[Adapter], suffix: str) -> dict[str, float]:
        """Mean centred cosines, and how often the nearest held-out picture is of the right subject.

        adapters: what is on while each subject is drawn.  suffix: of the result's keys, "alone" or "stack".
        """
        drawn = [
            draw_with(self.model, a, [s.prompt(c) for c in COLOURS[: self.drawn]], (self.model.size,) * 2)
            for s, a in zip(self.subjects, adapters)
        ]
        features = {k: [f(d) for d in drawn] for k, f in self.kinds.items()}
        out = {
            f"{k}_{suffix}": mean([similarity(d, r, self.centres[k]) for d, r in zip(features[k], self.references[k])])
            for k in self.kinds
        }
        labels = [s.name for s in self.subjects for _ in s.held_out_images]
        found = nearest(
            torch.cat(features["identity"]), torch.cat(self.references["identity"]), labels, self.centres["identity"]
        )
        truth = [s.name for s in self.subjects for _ in range(self.drawn)]
        return out | {f"one_nn_{suffix}": mean([float(a == b) for a, b in zip(found, truth)])}
