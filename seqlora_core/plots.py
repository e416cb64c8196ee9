"""Pictures of numbers as [1, height, width, 3] in 0..1: what they share, and training curves.

matplotlib is imported when the first picture is drawn; without it the pictures say so.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import fonts
from .errors import UserError
from .triggers import json_object


def to_pil(picture: Tensor):
    """[height, width, 3] in 0..1 -> PIL image"""
    from PIL import Image

    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())


def save_picture(picture, path: Path) -> None:
    """A PIL image as a file; UserError if it cannot be written there"""
    try:
        picture.save(path)
    except (OSError, ValueError) as error:  # ValueError: the suffix is no picture's
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the picture {path}: {reason}; choose another place") from error


def new_figure(width: float, height: float):
    """width, height: of 100 pixels each"""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def to_tensor(figure) -> Tensor:
    """A figure as it is drawn, [1, height, width, 3] in 0..1"""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32) / 255)[None]


def text_picture(text: str) -> Tensor:
    """A sentence where a picture cannot be drawn"""
    from PIL import Image, ImageDraw

    lines = textwrap.wrap(text, 48)
    picture = Image.new("RGB", (420, 60 + 24 * len(lines)), "white")
    ImageDraw.Draw(picture).multiline_text((24, 28), "\n".join(lines), fill="#333333", font_size=16, spacing=6)
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]


def needs_matplotlib(function):
    """The function, which draws a sentence instead where matplotlib is not installed"""

    def wrapper(*args, **kwargs):
        try:
            from matplotlib import font_manager, rc_context, rcParams

            more = [f for f in fonts.FAMILIES if f in font_manager.get_font_names()]
            # a name may hold $, and letters of any script
            with rc_context({"text.parse_math": False, "font.family": [*rcParams["font.family"], *more]}):
                return function(*args, **kwargs)
        except ImportError:
            return text_picture("No picture without matplotlib: install it into ComfyUI's Python, pip install matplotlib.")

    wrapper.__doc__ = function.__doc__
    return wrapper


def kept_curves_picture(metadata: dict[str, str]) -> Tensor:
    """The curves that a concept's file holds, see `metadata.curves`; files of earlier versions hold none"""
    kept = json_object(metadata.get("seqlora.curves"))
    values = [kept.get(key) for key in ("loss", "interference")]
    every = kept.get("every")
    numbers = all(isinstance(v, list) and v and all(type(x) in (int, float) for x in v) for v in values)
    if not (numbers and type(every) is int and every > 0 and len(values[0]) == len(values[1])):
        return text_picture("This concept's file holds no curves: it was trained before they were kept.")
    return curves_picture(*values, every)


@needs_matplotlib
def curves_picture(losses: list[float], energies: list[float], every: int = 1) -> Tensor:
    """Loss and interference energy against steps, each also smoothed over a twentieth of the run.  every: steps a value."""
    figure = new_figure(10, 4.5)
    steps = np.arange(1, len(losses) + 1) * every
    window = max(1, len(losses) // 20)
    for axes, values, colour, title in zip(
        figure.subplots(1, 2), (losses, energies), ("#1f5fa8", "#b5442e"),
        ("loss on the references", "interference energy, share of a layer's own"),
    ):  # fmt: skip
        axes.plot(steps, values, color="#bbbbbb", linewidth=0.8, label="each step" if every == 1 else f"mean of {every}")
        if len(values) >= window:
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axes.plot(steps[window - 1 :], smooth, color=colour, linewidth=2, label=f"mean of {window * every}")
            axes.annotate(f"{smooth[-1]:.3g}", (steps[-1], smooth[-1]), xytext=(4, 0), textcoords="offset points", color=colour)
        axes.set_title(title, fontsize=13)
        axes.set(xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return to_tensor(figure)
