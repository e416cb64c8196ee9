"""What keeps LoRAs apart where nothing but their weights is known?  docs/results/without_data.json.

    python -m benchmarks.without_data

On the six tuning concepts of `benchmarks.stacking`, at its learning rate: what mode "weights" was chosen on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.stacking import TUNING, Loras
from seqlora_core.adapter import Adapter, LayerDelta, concatenate
from seqlora_core.composition import closed_form, norm_controlled, symmetric
from seqlora_core.demo import load_generic, load_subject
from seqlora_core.demo_model import DemoModel
from seqlora_core.evaluation import held_out_loss, mean
from seqlora_core.statistics import Moments
from seqlora_core.tables import meta

ROOT = Path(__file__).resolve().parent.parent
STACKS = ((0, 1), (2, 3), (4, 5), (0, 2, 4), (1, 3, 5), (0, 1, 2, 3, 4, 5))


def unit(moment: Tensor) -> Tensor:
    return moment * (len(moment) / moment.trace())


def own_moment(delta: LayerDelta) -> Tensor:
    """`dW^T dW`: the inputs that a change reads, as a guess of those that it was trained on; in float64"""
    down, up = delta.down.double(), delta.up.double()
    return unit(down.mT @ (up.mT @ up) @ down)


def guessed(adapters: list[Adapter], base: dict[str, Tensor]) -> list[Adapter]:
    """The closed form with moments from weights: each adapter's own, and the base model's `W^T W` beside all of them"""
    moments = [Moments({n: own_moment(d) + base.get(n, 0) for n, d in a.layers.items()}) for a in adapters]
    return closed_form(adapters, moments, Moments(base) if base else None)


def ways(base: dict[str, Tensor]) -> dict:
    return {
        "plain sum": lambda a: a,
        "plain sum, over sqrt N": norm_controlled,
        "symmetric": symmetric,
        "symmetric, over sqrt N": lambda a: norm_controlled(symmetric(a)),
        "own row spaces, over sqrt N": lambda a: norm_controlled(guessed(a, {})),
        "own row spaces and W^T W": lambda a: guessed(a, base),
        "own row spaces and W^T W, over sqrt N": lambda a: norm_controlled(guessed(a, base)),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "without_data.json")
    args = parser.parse_args()
    model = DemoModel()
    loras = Loras(model)
    adapters, seen = [loras.adapter(n) for n in TUNING], [load_subject(model, n).held_out for n in TUNING]
    bare = [held_out_loss(model, h) for h in seen]
    gain = [b - held_out_loss(model, h, a) for b, h, a in zip(bare, seen, adapters)]
    generic = load_generic(model)
    unmoved, rows = held_out_loss(model, generic), []
    weights = {s.name: torch.cat([m.weight for m in s.modules]).double() for s in model.sites()}
    for name, way in ways({n: unit(w.mT @ w) for n, w in weights.items()}).items():
        kept: dict[int, list[float]] = {}
        for members in STACKS:
            stack = concatenate(way([adapters[i] for i in members]))
            kept.setdefault(len(members), []).extend(
                (bare[i] - held_out_loss(model, seen[i], stack)) / gain[i] for i in members
            )
        drift = held_out_loss(model, generic, stack) / unmoved - 1  # of all six
        rows.append({"row": name, "kept": {n: mean(k) for n, k in kept.items()}, "worst": min(kept[6]), "generic_drift": drift})
        print(rows[-1], flush=True)
    about = meta("python -m benchmarks.without_data", model.device, [0]) | {"concepts": list(TUNING), "rate": loras.rate}
    args.output.write_text(json.dumps({"meta": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
