"""Is what one concept does to another really under the bound?  docs/results/bound.json and docs/images/bound.png.

    python -m benchmarks.bound --library demo_output/library

For every ordered pair of concepts and every layer: the bound of METHOD.md from the stored moments, and how large the
change is on inputs that were not used for the moments (held-out pictures, other noise).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import NullFormatter
from torch import Tensor

from benchmarks.plots import new_figure, save
from seqlora_core.attach import Attachment, attached, flat
from seqlora_core.demo import load_subject
from seqlora_core.demo_model import DemoModel
from seqlora_core.interference import residual_energy, sub_gaussian_bound
from seqlora_core.library import Library
from seqlora_core.tables import meta

ROOT = Path(__file__).resolve().parent.parent
DELTA = 0.05
LEAST_ENERGY = 1e-12  # of a (pair, layer) that is counted


@torch.no_grad()
def layer_inputs(model: DemoModel, held_out, adapter, limit: int = 4000) -> dict[str, Tensor]:
    """Layer -> inputs [tokens, d] while the held-out pictures are seen with the concept's own adapter on."""
    seen: dict[str, list[Tensor]] = {}
    attachment = Attachment()
    attachment.set_frozen(adapter, model.device)
    attachment.record = lambda name, x: seen.setdefault(name, []).append(flat(x).clone())
    h, generator = held_out, torch.Generator().manual_seed(0)
    with attached(model.sites(), attachment):
        for part in torch.arange(len(h.latents)).split(48):
            model.predict(model.noised(h.latents[part], h.noise[part], h.sigma[part]), h.sigma[part], h.conditioning[part])
    joined = {name: torch.cat(parts) for name, parts in seen.items()}
    return {name: x[torch.randperm(len(x), generator=generator)[:limit]] for name, x in joined.items()}


def measure(model: DemoModel, library: Library) -> list[dict]:
    concepts, rows = library.concepts(), []
    for target in concepts:
        inputs = layer_inputs(model, load_subject(model, target.name).held_out, target.adapter)
        for source in concepts:
            if source is target:
                continue
            for name, delta in source.adapter.layers.items():
                moment = target.moments[name]
                energy = residual_energy(delta.up.double(), delta.down.double(), moment.double()).item()
                if energy < LEAST_ENERGY:
                    continue
                bound = sub_gaussian_bound(delta.up, delta.down, moment, DELTA)
                changes = (inputs[name] @ delta.down.mT @ delta.up.mT).norm(dim=1)
                rows.append(
                    {
                        "source": source.name, "target": target.name, "layer": name, "energy": energy, "bound": bound,
                        "quantile": changes.quantile(1 - DELTA).item(), "above": (changes > bound).float().mean().item(),
                    }
                )  # fmt: skip
    return rows


def figure(rows: list[dict], path: Path) -> None:
    picture, axes = new_figure(8, 6)
    bound, quantile = (np.array([r[k] for r in rows]) for k in ("bound", "quantile"))
    span = np.array([bound.min(), bound.max()])
    axes.loglog(bound, quantile, ".", color="#1f5fa8", alpha=0.5, markersize=5, label="one (pair, layer) each")
    axes.loglog(span, span, color="#b5442e", label="the bound: no dot above it, if its assumption holds")
    axes.set(
        xlabel=f"bound on the change that {1 - DELTA:.0%} of inputs keep, from the stored moments",
        ylabel=f"{1 - DELTA:.0%} quantile of the change on held-out inputs",
        title="What one concept does to another's layers",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.legend()
    picture.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=ROOT / "demo_output" / "library")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    model = DemoModel()
    rows = measure(model, Library(args.library, model.fingerprint()))
    above, ratios = np.array([r["above"] for r in rows]), np.array([r["bound"] / r["quantile"] for r in rows])
    result = {
        "meta": meta("python -m benchmarks.bound", model.device, [0]),
        "delta": DELTA, "dots": len(rows), "inputs_above": float(above.mean()), "worst_dot_above": float(above.max()),
        "dots_that_keep_the_promise": float((above <= DELTA).mean()),
        "bound_over_quantile": {"median": float(np.median(ratios)), "least": float(ratios.min()), "most": float(ratios.max())},
        "rows": [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in r.items()} for r in rows],
    }  # fmt: skip
    figure(rows, save(args.output, "bound", result))
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
