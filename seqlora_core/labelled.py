"""Pictures side by side, with words beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from .plots import to_pil

GAP = 18  # pixels between columns


def labelled_grid(rows: list[list[Tensor]], names: list[str], heads: list[str], tile: int):
    """PIL image; rows[i][j]: pictures [n, height, width, 3] of names[i] under heads[j], each drawn `tile` wide."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(max(12, min(24, tile // 7)))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def extent(text: str) -> tuple[int, int]:
        left, top, right, bottom = measure.multiline_textbbox((0, 0), text, font)
        return int(right - left), int(bottom - top)

    height, width = rows[0][0].shape[1:3]
    high = round(tile * height / width)
    left = max(extent(name)[0] for name in names) + 24
    top = max(extent(head)[1] for head in heads) + 16
    widths = [max(len(part) * tile, extent(head)[0]) for part, head in zip(rows[0], heads)]
    size = (left + sum(widths) + GAP * len(widths), top + len(rows) * (high + 6))
    sheet = Image.new("RGB", size, "white")
    draw, x = ImageDraw.Draw(sheet), left
    for column, head in enumerate(heads):
        draw.multiline_text((x + widths[column] / 2, top / 2), head, "black", font, anchor="mm", align="center")
        for index, parts in enumerate(rows):
            y, pictures = top + index * (high + 6), list(parts[column])
            strip = to_pil(torch.cat(pictures, 1)).resize((len(pictures) * tile, high), Image.Resampling.LANCZOS)
            sheet.paste(strip, (x, y))
            if column == 0:
                draw.multiline_text((left - 12, y + high / 2), names[index], "black", font, anchor="rm", align="right")
        x += widths[column] + GAP
    return sheet
