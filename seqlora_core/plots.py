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
    """Loss (smoothed over a twentieth of the run) and interference energy against steps."""
    figure = new_figure(8, 4)
    left, right = figure.subplots(1, 2)
    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, "valid") if losses else []
    left.plot(losses, color="#bbbbbb", linewidth=0.8)
    left.plot(np.arange(len(smooth)) + window - 1, smooth, color="#1f5fa8")
    left.set(title="loss", xlabel="step")
    right.plot(energies, color="#b5442e")
    right.set(title="interference energy, share of the layer's own", xlabel="step")
    return to_tensor(figure)
