"""Pictures of numbers: training curves and the crosstalk matrix, as [1, height, width, 3] in 0..1.

matplotlib is imported when the first picture is drawn; without it the pictures are blank.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .interference import Report


def to_pil(picture: Tensor):
    """[height, width, 3] in 0..1 -> PIL image"""
    from PIL import Image

    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _to_tensor(figure) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32) / 255)[None]


def _missing(function):
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ImportError:
            return torch.ones(1, 64, 64, 3)

    wrapper.__doc__ = function.__doc__
    return wrapper


@_missing
def curves_picture(losses: list[float], energies: list[float]) -> Tensor:
    """Loss (smoothed over a twentieth of the run) and interference energy against steps."""
    figure = _figure(8, 4)
    left, right = figure.subplots(1, 2)
    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, "valid") if losses else []
    left.plot(losses, color="#bbbbbb", linewidth=0.8)
    left.plot(np.arange(len(smooth)) + window - 1, smooth, color="#1f5fa8")
    left.set(title="loss", xlabel="step")
    right.plot(energies, color="#b5442e")
    right.set(title="interference energy, share of the layer's own", xlabel="step")
    return _to_tensor(figure)


@_missing
def crosstalk_picture(report: Report) -> Tensor:
    """The report's matrix as a heat map with its numbers."""
    matrix = np.array(report.crosstalk or report.overlap)
    title = "crosstalk: share of the column's own effect" if report.crosstalk else "overlap, multiples of chance (weights only)"
    count = len(report.names)
    side = max(4.5, 1.5 + 0.55 * count)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    shown = matrix.copy()
    if report.crosstalk:
        np.fill_diagonal(shown, 0)
    picture = axes.imshow(shown, cmap="OrRd", vmin=0, vmax=max(0.25, float(shown.max())))
    axes.set(title=title, xticks=range(count), yticks=range(count))
    axes.set_xticklabels(report.names, rotation=45, ha="right")
    axes.set_yticklabels(report.names)
    axes.set(xlabel="concept that is disturbed", ylabel="concept that disturbs")
    if count <= 16:
        for i in range(count):
            for j in range(count):
                dark = shown[i, j] > 0.6 * picture.norm.vmax
                axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
    figure.colorbar(picture, ax=axes, shrink=0.8)
    return _to_tensor(figure)
