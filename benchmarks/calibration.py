"""How many pictures, drawn in how many steps, does a calibration need?  docs/results/calibration.json, docs/images/calibration.png.

    python -m benchmarks.calibration

Moments from few pictures against those from many others, layer by layer, in the metric that the bases use: the mean absolute
eigenvalue of `W (G_few - G_many) W` with `W = ridge(G_many)^(-1/2)`.  It is how wrong an energy is, as a share of itself, in
the mean over directions; single directions (a word that only a few pictures have) stay wrong by more.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.plots import new_figure, save
from seqlora_core.demo_model import SIZE, DemoModel
from seqlora_core.drawing import draw
from seqlora_core.linalg import whitening
from seqlora_core.prompts import generic_prompts
from seqlora_core.subspace import EPS
from seqlora_core.tables import meta

ROOT = Path(__file__).resolve().parent.parent
PICTURES, STEPS = (12, 24, 48, 96, 192, 288), (2, 4, 8, 16)


def errors(model: DemoModel, reference, prompts: list[str], steps: int) -> tuple[float, float, float]:
    """Median and worst error over the layers, and seconds of the processor"""
    start = time.process_time()
    moments = draw(model, prompts, 1, (SIZE, SIZE), steps=steps).moments
    seconds = time.process_time() - start
    found = []
    for name, (white, many) in reference.items():
        difference = white @ (moments[name] - many).double() @ white
        found.append(float(torch.linalg.eigvalsh(difference).abs().mean()))
    return float(np.median(found)), max(found), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    model, count = DemoModel(), max(PICTURES)
    prompts = generic_prompts(3 * count, seed=0)
    many = draw(model, prompts[count:], 0, (SIZE, SIZE), steps=max(STEPS)).moments
    reference = {name: (whitening(many[name].double(), EPS)[0], many[name]) for name in many.layers}
    rows = []
    for pictures in PICTURES:
        for steps in STEPS:
            median, worst, seconds = errors(model, reference, prompts[:pictures], steps)
            rows.append(
                {"pictures": pictures, "steps": steps, "median_error": median, "worst_error": worst, "seconds": seconds}
            )
            print(rows[-1], flush=True)
    result = {"meta": meta("python -m benchmarks.calibration", model.device, [0]), "rows": rows}
    figure(rows, save(args.output, "calibration", result))


def figure(rows: list[dict], path: Path) -> None:
    picture, (left, right) = new_figure(11, 4.2, 2)
    for steps in STEPS:
        own = [r for r in rows if r["steps"] == steps]
        label = f"{steps} steps a picture"
        left.semilogx([r["pictures"] for r in own], [r["median_error"] for r in own], ".-", label=label)
        right.plot([r["pictures"] for r in own], [r["seconds"] for r in own], ".-", label=label)
    left.set(title="error of the moments, median over layers", xlabel="pictures", xticks=PICTURES)
    left.get_xaxis().set_major_formatter("{x:.0f}")
    left.minorticks_off()
    left.set_ylim(bottom=0)
    right.set(title="seconds", xlabel="pictures")
    left.legend()
    picture.savefig(path)


if __name__ == "__main__":
    main()
