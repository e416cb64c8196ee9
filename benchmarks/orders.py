"""Does it matter in which order concepts are taught?  docs/results/orders.json.

    python -m benchmarks.orders --steps 160 --rates seqlora=0.003 ordinary=0.003

Five concepts of the final set in five orders, each of which begins with another one and goes on round: so every concept is
taught once at every place.  Options, learning rate and caches are those of `benchmarks.method`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import concepts
from benchmarks.method import ROOT, Bench, given_rates
from seqlora_core.config import TrainingConfig
from seqlora_core.evaluation import held_out_loss, mean, summed
from seqlora_core.storage import written_aside
from seqlora_core.tables import meta

COUNT = 5


def run(bench: Bench, names: list[str], rate: float, seed: int = 0) -> list[dict]:
    """For each order what each concept has kept in the whole stack, by the place it was taught at"""
    base = {n: held_out_loss(bench.model, bench.subject(n).held_out) for n in names}
    best = {n: bench.loss(n, bench.ordinary(n, bench.rate("ordinary"), seed)) for n in names}
    rows = []
    for first in range(len(names)):
        order = names[first:] + names[:first]
        library = bench.chain("seqlora", rate, seed, order, len(order))
        stack = summed([c.adapter for c in library.concepts()])(list(range(len(order))))
        kept = [(base[n] - bench.loss(n, stack)) / (base[n] - best[n]) for n in order]
        drift = bench.drift(stack)
        rows.append({"order": order, "kept": kept, "generic_drift": drift})
        print(", ".join(f"{n} {k:.2f}" for n, k in zip(order, kept)), f"drift {drift:+.1%}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=TrainingConfig().steps)
    parser.add_argument("--rates", nargs="+", default=[], metavar="ROW=RATE", help="not to be searched for: seqlora=0.003")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / "cache")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "orders.json")
    args = parser.parse_args()
    bench = Bench(args.cache, args.steps)
    bench.rates = given_rates(args.rates)
    rate = bench.rate("seqlora", COUNT)
    rows = run(bench, concepts.names("final")[:COUNT], rate)
    about = meta("python -m benchmarks.orders", bench.model.device, [0]) | {"steps": args.steps, "learning_rate": rate}
    places = [mean([r["kept"][place] for r in rows]) for place in range(COUNT)]
    with written_aside(args.output) as file:
        file.write((json.dumps({"meta": about, "places": places, "rows": rows}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
