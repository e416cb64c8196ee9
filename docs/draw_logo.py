"""Draws the icon and the banner: concepts in directions of their own, and their sum.

python docs/draw_logo.py
"""

from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

IMAGES = Path(__file__).resolve().parent / "images"
GROUND, EMPTY, INK = "#14161c", "#272b36", "#f4f5f7"
COLOURS = ("#ff6b6b", "#ffd166", "#06d6a0", "#4d96ff")
SMOOTH = 4  # drawn this much larger, then reduced


def stack(draw: ImageDraw.ImageDraw, left: int, top: int, side: int) -> None:
    """Rows of cells: each concept fills its own column, the row below them all."""
    n, gap = len(COLOURS), side // 24
    cell = (side - (n - 1) * gap) / n
    height = (side - n * gap - gap) / (n + 1)
    for row in range(n + 1):
        y = top + row * (height + gap) + (gap if row == n else 0)
        for column, colour in enumerate(COLOURS):
            x = left + column * (cell + gap)
            fill = colour if column == row or row == n else EMPTY
            draw.rounded_rectangle((x, y, x + cell, y + height), height / 4, fill=fill)


def font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size * SMOOTH)


def icon() -> Image.Image:
    side = 400 * SMOOTH
    picture = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle((0, 0, side - 1, side - 1), side // 6, fill=GROUND)
    margin = side // 6
    stack(draw, margin, margin, side - 2 * margin)
    return picture.resize((400, 400), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    width, height = 1260 * SMOOTH, 540 * SMOOTH
    picture = Image.new("RGB", (width, height), GROUND)
    draw = ImageDraw.Draw(picture)
    margin = height // 6
    stack(draw, margin, margin, height - 2 * margin)
    x = height - margin // 4
    draw.text((x, height * 0.28), "SeqLoRA", fill=INK, font=font(112, True))
    draw.text((x, height * 0.55), "Concepts that stack.", fill=INK, font=font(44, False))
    draw.text((x, height * 0.67), "For ComfyUI", fill="#9aa3b5", font=font(32, False))
    return picture.resize((1260, 540), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    icon().save(IMAGES / "icon.png", optimize=True)
    banner().save(IMAGES / "banner.png", optimize=True)
