"""How many pictures and noise levels does a calibration need?  docs/results/calibration.json, docs/images/calibration.png.

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
from seqlora_core.calibration import draw, record_moments
from seqlora_core.demo_model import SIZE, DemoModel
from seqlora_core.linalg import whitening
from seqlora_core.prompts import generic_prompts
from seqlora_core.subspace import EPS
from seqlora_core.tables import meta

ROOT = Path(__file__).resolve().parent.parent
PICTURES, PASSES = (12, 24, 48, 96, 192, 288), (1, 2, 4, 8)


def errors(model: DemoModel, reference, latents, prompts, passes: int) -> tuple[float, float, float]:
    """Median and worst error over the layers, and seconds of recording"""
    start = time.perf_counter()
    moments = record_moments(model, latents, model.encode_prompts(prompts), passes=passes, seed=1)
    seconds = time.perf_counter() - start
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
    prompts = generic_prompts(2 * count, seed=0)
    start = time.perf_counter()
    latents = draw(model, prompts, 0, (SIZE, SIZE))
    seconds_each = (time.perf_counter() - start) / len(prompts)
    many = record_moments(model, latents[count:], model.encode_prompts(prompts[count:]), passes=8)
    reference = {}
    for name in many.layers:
        reference[name] = (whitening(many[name].double(), EPS)[0], many[name])
    rows = []
    for pictures in PICTURES:
        for passes in PASSES:
            median, worst, seconds = errors(model, reference, latents[:pictures], prompts[:pictures], passes)
            rows.append(
                {
                    "pictures": pictures, "passes": passes, "median_error": median, "worst_error": worst,
                    "seconds": seconds + pictures * seconds_each,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    result = {"meta": meta("python -m benchmarks.calibration", model.device, [0]), "rows": rows}
    figure(rows, save(args.output, "calibration", result))


def figure(rows: list[dict], path: Path) -> None:
    picture, (left, right) = new_figure(11, 4.2, 2)
    for passes in PASSES:
        own = [r for r in rows if r["passes"] == passes]
        label = f"{passes} noise level{'s' if passes > 1 else ''} a picture"
        left.semilogx([r["pictures"] for r in own], [r["median_error"] for r in own], ".-", label=label)
        right.plot([r["pictures"] for r in own], [r["seconds"] for r in own], ".-", label=label)
    left.set(title="error of the moments, median over layers", xlabel="pictures", xticks=PICTURES)
    left.get_xaxis().set_major_formatter("{x:.0f}")
    left.minorticks_off()
    left.set_ylim(bottom=0)
    right.set(title="seconds, drawing included", xlabel="pictures")
    left.legend()
    picture.savefig(path)


if __name__ == "__main__":
    main()
