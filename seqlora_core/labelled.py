"""Pictures side by side, with words beside them."""

from __future__ import annotations

import bisect

import torch
from torch import Tensor

from .fonts import lettered
from .plots import to_pil

GAP = 18  # pixels between columns
ROOM = 320  # that words have where the pictures are narrower
LINES = 3  # of words, at most, where one does not do


def labelled_grid(rows: list[list[Tensor]], names: list[str], heads: list[str], tile: int):
    """PIL image; rows[i][j]: pictures [n, height, width, 3] of names[i] under heads[j], each drawn `tile` wide."""
    from PIL import Image, ImageDraw

    size = max(12, min(24, tile // 7))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def extent(label: tuple) -> tuple[int, int]:
        left, top, right, bottom = measure.multiline_textbbox((0, 0), *label)
        return int(right - left), int(bottom - top)

    def fitted(words: str, room: int) -> tuple:
        """In lines of that width, and their font"""
        text, font = lettered(words, size)
        lines = [part for line in text.split("\n") for part in _broken(line, room, lambda t: extent((t, font))[0])]
        return "\n".join(lines), font

    height, width = rows[0][0].shape[1:3]
    high = round(tile * height / width)
    beside = [fitted(name, ROOM) for name in names]
    above = [fitted(head, max(len(part) * tile, ROOM)) for part, head in zip(rows[0], heads)]
    left = max(extent(label)[0] for label in beside) + 24
    top = max(extent(label)[1] for label in above) + 16
    widths = [max(len(part) * tile, extent(label)[0]) for part, label in zip(rows[0], above)]
    sheet = Image.new("RGB", (left + sum(widths) + GAP * len(widths), top + len(rows) * (high + 6)), "white")
    draw, x = ImageDraw.Draw(sheet), left
    for column, (head, font) in enumerate(above):
        draw.multiline_text((x + widths[column] / 2, top / 2), head, "black", font, anchor="mm", align="center")
        for index, parts in enumerate(rows):
            y, pictures = top + index * (high + 6), list(parts[column])
            strip = to_pil(torch.cat(pictures, 1)).resize((len(pictures) * tile, high), Image.Resampling.LANCZOS)
            sheet.paste(strip, (x, y))
            if column == 0:
                name, own = beside[index]
                draw.multiline_text((left - 12, y + high / 2), name, "black", own, anchor="rm", align="right")
        x += widths[column] + GAP
    return sheet


def _broken(line: str, room: int, width) -> list[str]:
    """A line in several no wider than `room`, the last of which says if there is more.  width: of a text, pixels"""
    parts = []
    while line and width(line) > room and len(parts) < LINES:
        count = max(1, bisect.bisect(range(len(line)), room, key=lambda n: width(line[:n])) - 1)
        space = line[: count + 1].rfind(" ")
        count = space if space > count // 2 else count
        parts.append(line[:count].strip())
        line = line[count:].strip()
    if len(parts) < LINES:
        return [*parts, line]
    return [*parts[:-1], parts[-1][:-1] + "…"] if line else parts
