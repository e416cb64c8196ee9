"""An interference report as one picture, legible in a node's preview with 2 concepts and with 101."""

from __future__ import annotations

import textwrap

import numpy as np
from torch import Tensor

from .plots import needs_matplotlib, new_figure, to_tensor
from .report import Report, percent

WIDTH = 8.4  # inches, at 100 dots each
NAMED = 24  # concepts up to which every row of a map has its name
NUMBERED = 10  # up to which every cell has its number
BARS = 10  # most disturbed concepts, or worst pairs, that get a bar
BEFORE, AFTER = "#d98c73", "#1f5fa8"
CHANCES = 8.0  # overlap at which the colour scale ends
LONGEST = 16  # characters of a name
LEVEL = 26  # characters of all names together that fit beside one another


@needs_matplotlib
def report_picture(report: Report) -> Tensor:
    """Crosstalk as a plain sum and with the projection; the most disturbed concepts (from the weights alone: the most
    alike pairs); advice."""
    advice = _wrapped(report)
    bars = min(len(report.names) if report.measured else max(1, len(report.worst)), BARS)
    heights = [
        0.4,
        4.3 if report.after is not None else 5.6,
        (0.9 if report.after is None else 1.2) + 0.32 * bars,
        0.1 + 0.24 * len(advice),
    ]
    figure = new_figure(WIDTH, sum(heights) + 0.3)
    head, upper, middle, lower = figure.subfigures(4, 1, height_ratios=heights)
    what = (
        "How much of each concept's own effect another one adds"
        if report.measured
        else "Shared input directions, in multiples of chance: from the weights alone"
    )
    head.text(0.5, 0.5, what, ha="center", va="center", fontsize=13.5, weight="bold")
    _maps(upper, report)
    _bars(middle.subplots(), report)
    lower.text(0.02, 0.98, "\n".join(advice), va="top", fontsize=11.5, linespacing=1.35)
    return to_tensor(figure)


def short(name: str) -> str:
    """A name that fits beside the picture"""
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _wrapped(report: Report) -> list[str]:
    lines = []
    told = report.advice[:4] or ["No advice: nothing here is worth a change."]
    for sentence in [*told, *filter(None, [report.kept])]:
        lines += textwrap.wrap(sentence[0].upper() + sentence[1:], 92, initial_indent="•  ", subsequent_indent="    ")
    return lines


def _maps(figure, report: Report) -> None:
    from matplotlib.colors import PowerNorm

    maps = [("as a plain sum", report.before)]
    if report.after is not None:
        maps.append((f"with mode '{report.mode}'", report.after))
    count = len(report.names)
    norm = PowerNorm(0.5, 0, 1 if report.measured else CHANCES, clip=True)
    all_axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (title, matrix) in zip(all_axes, maps):
        shown = np.array(matrix)
        np.fill_diagonal(shown, np.nan)
        picture = axes.imshow(shown, cmap="OrRd", norm=norm, interpolation="nearest")
        axes.set_facecolor("#dddddd")
        axes.set_title(title, fontsize=13)
        axes.set_xlabel("is disturbed" if report.measured else "", fontsize=11.5)
        _ticks(axes, report.names, first=axes is all_axes[0], measured=report.measured)
        if count <= NUMBERED:
            for i, j in zip(*np.nonzero(~np.isnan(shown))):
                dark = norm(shown[i, j]) > 0.6
                size = min(13, (115 if report.after is None else 75) / count)
                axes.text(
                    j,
                    i,
                    _number(shown[i, j], report.measured),
                    ha="center",
                    va="center",
                    fontsize=size,
                    color="white" if dark else "black",
                )
    bar = figure.colorbar(picture, ax=list(all_axes), shrink=0.8, aspect=28, pad=0.02, extend="max")
    bar.ax.tick_params(labelsize=10.5)
    if report.measured:
        bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], labels=["0", "1%", "5%", "10%", "25%", "50%", "100%"])
    else:
        bar.set_ticks([0, 1, 2, 4, 8])


def _ticks(axes, names: list[str], first: bool, measured: bool) -> None:
    count, size, labels = len(names), 11.5 if len(names) <= 12 else 8.5, [short(n) for n in names]
    if count <= NAMED:
        crowded = count > 4 or count * max(map(len, labels)) > LEVEL
        axes.set_xticks(range(count), labels, rotation=90 if crowded else 0, fontsize=size)
        axes.set_yticks(range(count), labels if first else [], fontsize=size)
    else:
        step = 10 if count <= 120 else 50
        places = [0, *range(step - 1, count, step)]
        axes.set_xticks(places, [str(p + 1) for p in places], fontsize=10)
        axes.set_yticks(places, [str(p + 1) for p in places] if first else [], fontsize=10)
    if first and measured:
        axes.set_ylabel("disturbs", fontsize=11.5)


def _number(value: float, measured: bool) -> str:
    if not measured:
        return f"{value:.1f}"
    return percent(value)


def _bars(axes, report: Report) -> None:
    if report.measured:
        order = np.argsort(report.disturbance)[::-1][:BARS]
        labels, before = [short(report.names[j]) for j in order], [report.disturbance[j] for j in order]
        after = None if report.disturbance_after is None else [report.disturbance_after[j] for j in order]
        title = "Moved by all others together, as a share of a concept's effect"
    else:
        labels = [f"{short(p['source'])} and {short(p['target'])}" for p in report.worst] or ["no pair"]
        before = [p["before"] for p in report.worst] or [0.0]
        after = None if report.after is None else [p["after"] for p in report.worst] or [0.0]
        title = "The most alike pairs, in multiples of chance"
    if len(report.names) > BARS and report.measured:
        title += f" (the worst {len(order)} of {len(report.names)})"
    rows, height = np.arange(len(before)), 0.8 if after is None else 0.4
    axes.barh(rows - (0 if after is None else 0.2), before, height, color=BEFORE, label="as a plain sum")
    if after is not None:
        axes.barh(rows + 0.2, after, height, color=AFTER, label=f"with mode '{report.mode}'")
        axes.legend(fontsize=11, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False)
    values = zip(rows, before) if after is None else [*zip(rows - 0.2, before), *zip(rows + 0.2, after)]
    for y, value in values:
        axes.text(value, y, " " + _number(value, report.measured), va="center", fontsize=10)
    axes.set_yticks(rows, labels, fontsize=11.5)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=13)
    axes.set_xticks([])
    axes.set_xlim(0, 1.12 * max([*before, *(after or []), 1e-6]))
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
