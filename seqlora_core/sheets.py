"""Contact sheets: rows of subjects, columns of what was drawn of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .adapter import Adapter, concatenate
from .demo_model import SIZE
from .identity import COLOURS
from .labelled import labelled_grid
from .preview import draw_with


def contact_sheet(model, subjects, ours: list[Adapter], ordinary: list[Adapter], path: Path, columns: int = 3) -> None:
    """Rows: subjects.  Columns: references | base | ours alone | all of ours | all ordinary ones."""
    both = {"ours": concatenate(ours), "ordinary": concatenate(ordinary)}
    rows = []
    for subject, own in zip(subjects, ours):
        prompts = [subject.prompt(c) for c in COLOURS[:columns]]
        parts = [subject.images[:columns]]
        for adapter in (None, own, both["ours"], both["ordinary"]):
            parts.append(draw_with(model, adapter, prompts, (SIZE, SIZE)))
        rows.append(parts)
    heads = ["references", "base model", "one concept", f"all {len(ours)} stacked", f"{len(ours)} ordinary LoRAs\nstacked"]
    save_sheet(rows, [s.name for s in subjects], heads, path)


def pair_sheet(model, subjects, ours: list[Adapter], ordinary: list[Adapter], path: Path, columns: int = 3) -> None:
    """Two concepts in one prompt, everything stacked: ours, and ordinary LoRAs."""
    rows, names = [], []
    for first, second in zip(subjects, [*subjects[1:], subjects[0]]):
        prompts = [f"{first.phrase} on the left and {second.phrase} on the right, {c} background" for c in COLOURS[:columns]]
        parts = [torch.cat([first.images[:1], second.images[:1]])]
        for adapters in (ours, ordinary):
            parts.append(draw_with(model, concatenate(adapters), prompts, (SIZE, SIZE)))
        rows.append(parts)
        names.append(f"{first.name}\n{second.name}")
    save_sheet(rows, names, ["references", f"all {len(ours)} stacked", f"{len(ours)} ordinary LoRAs stacked"], path)


def save_sheet(rows: list[list[Tensor]], names: list[str], heads: list[str], path: Path, zoom: int = 2) -> None:
    """rows[i][j]: pictures [n, height, width, 3] of subject names[i] under heads[j]."""
    labelled_grid(rows, names, heads, SIZE * zoom).save(path)
