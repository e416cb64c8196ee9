"""What every figure here starts from, and those of docs/results/method*.json: what is kept as the number of concepts grows."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOOR = -1.5  # of the axis: an arrow on it stands for what falls below
LEAST_DRIFT = 0.1  # percent, of the logarithmic axis
LEARNT = "_learnt_trigger"
SHOWN = ("seqlora_learnt_trigger", "seqlora_text_learnt_trigger")  # of the method's own variants


def new_figure(width: float, height: float, columns: int = 1):
    """A figure that needs no screen, and its axes"""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def save(output: Path, name: str, result: dict) -> Path:
    """Writes output/results/NAME.json; returns where its figure goes, output/images/NAME.png."""
    for folder in ("results", "images"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    (output / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return output / "images" / f"{name}.png"


def method(rows: list[dict], path: Path) -> None:
    """Kept, the worst concept, and generic drift against N, a line for each row of the table."""
    figure, axes = new_figure(14, 5.4, 3)
    names = list(dict.fromkeys(r["row"] for r in rows))
    names = [n for n in names if (not n.startswith("seqlora_") or n in SHOWN) and "_rate_" not in n]
    plain = list(dict.fromkeys(map(_plain, names)))
    for name in names:
        own = sorted((r for r in rows if r["row"] == name), key=lambda r: r["n"])
        style = {"linewidth": 1.3, "color": f"C{plain.index(_plain(name))}"}
        if name.startswith("seqlora"):
            style = {"linewidth": 3, "color": "darkred" if "text" in name else "black", "zorder": 5}
        if LEARNT in name:
            style |= {"linestyle": "--"}
        counts = [r["n"] for r in own]
        for plot, key in zip(axes, ("kept_mean", "kept_worst", "generic_drift")):
            unit, floor = (100, LEAST_DRIFT) if key == "generic_drift" else (1, FLOOR)
            values = [unit * r[key] for r in own]
            spread = [unit * r["spread"].get(key, 0.0) * (v >= floor) for r, v in zip(own, values)]
            shown = [max(floor, v) for v in values]
            plot.errorbar(counts, shown, yerr=spread, marker="o", markersize=4, capsize=2, label=name, **style)
            below = [(c, floor) for c, v in zip(counts, values) if v < floor]
            plot.plot([c for c, _ in below], [y for _, y in below], "v", markersize=9, color=style["color"], zorder=6)
    titles = "kept, mean over concepts", "kept, the worst concept", "rise of the error on generic prompts, %"
    for plot, title in zip(axes, titles):
        plot.set(title=title, xlabel="concepts in the stack", xscale="log", xticks=sorted({r["n"] for r in rows}))
        plot.get_xaxis().set_major_formatter("{x:.0f}")
        plot.minorticks_off()
        plot.grid(alpha=0.3)
    for plot in axes[:2]:
        plot.set_ylim(FLOOR - 0.1, 1.1)
    axes[2].set(yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=6)
    figure.savefig(path)


def _plain(name: str) -> str:
    """The row of the same without a learnt trigger, which has one colour with it"""
    plain = name.replace(LEARNT, "")
    return {"ordinary": "ordinary_sum", "ordinary_closed_form": "closed_form"}.get(plain, plain)


def main() -> None:
    def load(name: str) -> dict:
        return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))

    for name in ("method", "method_long_triggers"):
        method(load(name)["rows"], ROOT / "docs" / "images" / f"{name}.png")


if __name__ == "__main__":
    main()
