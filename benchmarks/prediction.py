"""Does the report foresee which concepts suffer?  docs/results/prediction.json and docs/images/prediction.png.

    python -m benchmarks.prediction

Fifty random stacks (two to six of the ten LoRAs of `benchmarks.stacking`, random strengths): what the report says the others
move of each concept, against how much worse its held-out pictures get than with it alone at the same strength.  What to
predict with was chosen on stacks of six other concepts (--concepts tuning) and on fifty of these ten (--seed 0); the figure is
of fifty others.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np

from benchmarks.plots import new_figure, save
from benchmarks.stacking import TEN, TUNING, Loras
from seqlora_core.adapter import concatenate
from seqlora_core.demo import load_subject
from seqlora_core.demo_model import DemoModel
from seqlora_core.evaluation import HeldOut, held_out_loss
from seqlora_core.report import interference_report
from seqlora_core.tables import meta

ROOT = Path(__file__).resolve().parent.parent
STACKS, LEAST, MOST = 50, 2, 6
STRENGTHS = (0.2, 1.2)


def spearman(first, second) -> float:
    """Rank correlation; no two values are equal here"""
    ranks = [np.argsort(np.argsort(v)) for v in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def dots(model: DemoModel, loras: Loras, names: tuple[str, ...], stacks: int, seed: int) -> list[dict]:
    """One for each concept of each stack"""
    subjects = {n: load_subject(model, n) for n in names}
    # every second noise level is enough to rank
    seen = {
        n: HeldOut(h.latents[::2], h.conditioning[::2], h.noise[::2], h.sigma[::2])
        for n, h in ((n, s.held_out) for n, s in subjects.items())
    }
    adapters = {n: loras.adapter(n) for n in names}
    moments = {n: loras.moments(s) for n, s in subjects.items()}
    rng, out = random.Random(seed), []
    for number in range(stacks):
        members = rng.sample(names, rng.randint(LEAST, MOST))
        strengths = [round(rng.uniform(*STRENGTHS), 2) for _ in members]
        report = interference_report({n: adapters[n] for n in members}, moments, strengths)
        parts = [adapters[n].scaled(s) for n, s in zip(members, strengths)]
        whole = concatenate(parts)
        for name, strength, part, predicted in zip(members, strengths, parts, report.disturbance):
            loss = held_out_loss(model, seen[name], whole) - held_out_loss(model, seen[name], part)
            out.append({"stack": number, "concept": name, "strength": strength, "predicted": predicted, "lost": loss})
        print(f"stack {number + 1} of {stacks}: {', '.join(members)}", flush=True)
    return out


def within(found: list[dict], key: str, least: int = 4) -> float:
    """Mean rank correlation among the dots of one stack, or of one concept: what is left when stacks do not differ"""
    groups = [[d for d in found if d[key] == value] for value in dict.fromkeys(d[key] for d in found)]
    return float(np.mean([spearman([d["predicted"] for d in g], [d["lost"] for d in g]) for g in groups if len(g) >= least]))


def figure(found: list[dict], result: dict, path: Path) -> None:
    picture, axes = new_figure(8, 5.6)
    for name in dict.fromkeys(d["concept"] for d in found):
        own = [d for d in found if d["concept"] == name]
        axes.loglog(
            [d["predicted"] for d in own], [max(d["lost"], 1e-3) for d in own], ".", markersize=9, alpha=0.8, label=name
        )
    axes.set(
        xlabel="predicted: what the others move, as a share of what a concept of the stack does",
        ylabel="measured: loss on held-out pictures above that alone",
        title=f"{result['stacks']} random stacks, {result['dots']} concepts in them: Spearman {result['spearman']:.2f}",
    )
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=9)
    picture.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", choices=["tuning", "ten"], default="ten")
    parser.add_argument("--stacks", type=int, default=STACKS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    model = DemoModel()
    found = dots(model, Loras(model), TEN if args.concepts == "ten" else TUNING, args.stacks, args.seed)
    result = {
        "meta": meta("python -m benchmarks.prediction", model.device, [args.seed]) | {"concepts": args.concepts},
        "stacks": args.stacks, "dots": len(found),
        "spearman": spearman([d["predicted"] for d in found], [d["lost"] for d in found]),
        "within_stack": within(found, "stack"), "within_concept": within(found, "concept"), "points": found,
    }  # fmt: skip
    figure(found, result, save(args.output, "prediction", result))
    print({k: v for k, v in result.items() if k != "points"})


if __name__ == "__main__":
    main()
