"""Pictures of numbers as [1, height, width, 3] in 0..1: what they share, and training curves.

matplotlib is imported when the first picture is drawn; without it the pictures are blank.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_pil(picture: Tensor):
    """[height, width, 3] in 0..1 -> PIL image"""
    from PIL import Image

    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def to_tensor(figure) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32) / 255)[None]


def blank_without_matplotlib(function):
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ImportError:
            return torch.ones(1, 64, 64, 3)

    wrapper.__doc__ = function.__doc__
    return wrapper


@blank_without_matplotlib
def curves_picture(losses: list[float], energies: list[float]) -> Tensor:
    """Loss and interference energy against steps, each also smoothed over a twentieth of the run."""
    figure = new_figure(10, 4.5)
    steps = np.arange(1, len(losses) + 1)
    window = max(1, len(losses) // 20)
    for axes, values, colour, title in zip(
        figure.subplots(1, 2), (losses, energies), ("#1f5fa8", "#b5442e"),
        ("loss on the references", "interference energy, share of a layer's own"),
    ):  # fmt: skip
        axes.plot(steps, values, color="#bbbbbb", linewidth=0.8, label="each step")
        if len(values) >= window:
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            axes.plot(steps[window - 1 :], smooth, color=colour, linewidth=2, label=f"mean of {window}")
            axes.annotate(f"{smooth[-1]:.3g}", (steps[-1], smooth[-1]), xytext=(4, 0), textcoords="offset points", color=colour)
        axes.set_title(title, fontsize=13)
        axes.set(xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return to_tensor(figure)
