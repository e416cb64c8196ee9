"""Does the bilevel fit converge at the rate that theory gives?  docs/results/convergence.json, docs/images/convergence.png.

    python -m benchmarks.convergence

One concept of the demo on one fixed batch of support and one of query, so that the gradient is exact; plain Riemannian
gradient steps on the bases of one length, and between them lora_up is solved for by L-BFGS, from where it was.  A small
ridge makes the lower level strictly convex near its minimum, as the theory asks.  For smooth objectives the least
gradient norm after T steps falls at least as fast as T^(-1/2) (Boumal, Absil, Cartis, "Global rates of convergence for
nonconvex optimization on manifolds", 2019, theorem 5; for the bilevel objective Ghadimi and Wang 2018).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.plots import new_figure, save
from seqlora_core.attach import Attachment, attached
from seqlora_core.bilevel import UpperLevel
from seqlora_core.calibration import calibrate, record_moments
from seqlora_core.captions import Prompts
from seqlora_core.config import TrainingConfig
from seqlora_core.demo import load_subject
from seqlora_core.demo_model import SIZE, DemoModel
from seqlora_core.hypergradient import hypergradient
from seqlora_core.linalg import retract, tangent
from seqlora_core.objective import Objective
from seqlora_core.parallel import Workers
from seqlora_core.replay import Replay
from seqlora_core.start import others_moments, starting_groups
from seqlora_core.tables import meta

ROOT = Path(__file__).resolve().parent.parent
RATE, RIDGE = 0.3, 1e-2
FIRST, LATER = 200, 40  # iterations of the lower level, before the first step of the basis and before each other


def run(model: DemoModel, calibration, how: str, steps: int, batch: int = 16, first: int = FIRST, later: int = LATER):
    """Before each of `steps` steps of the basis: Riemannian norm of the (hyper)gradient, the upper objective, and the norm of
    the lower level's gradient, which is 0 where that is solved"""
    subject = load_subject(model, "octopus")
    config = replace(TrainingConfig(), batch=batch, drift_budget=0.0, hypergradient=how, lower_steps=1)
    prompts = Prompts(model, subject.references.captions, subject.trigger, config)
    seen = record_moments(model, subject.references.latents, prompts.plain)
    replay = Replay(model, subject.references, subject.trigger, [], calibration, config)
    generator = torch.Generator().manual_seed(0)
    others = others_moments(calibration.moments, replay.decoy_moments, [], config)
    groups, _ = starting_groups(model, seen, others, [], calibration, config, generator)
    attachment, norms, values, unsolved = Attachment(), [], [], []
    objective = Objective(
        model, [subject.references], [prompts], replay, groups, None, attachment, config, generator, Workers()
    )
    ups, bases, upper = [g.up for g in groups], [g.basis for g in groups], UpperLevel(groups, RATE)
    with attached(model.sites(), attachment), sdpa_kernel(SDPBackend.MATH):
        support, query = objective.draw(0), objective.draw(1)

        def lower() -> Tensor:
            return objective.value(*support) + RIDGE / 2 * sum(u.square().sum() for u in ups)

        for step in range(steps):
            unsolved.append(solve(lower, ups, later if step else first))
            value, gradients = hypergradient(lambda: objective.value(*query), lower, ups, bases, how)
            values.append(float(value))
            for group, gradient in zip(groups, gradients):
                group.basis.grad = gradient
            norms.append(upper.gradient_norm())
            with torch.no_grad():
                for g in groups:
                    g.basis.copy_(retract(g.basis, -RATE * tangent(g.basis, g.basis.grad, g.occupied), g.occupied))
            print(f"{how} step {step} gradient norm {norms[-1]:.5f}, the lower level's {unsolved[-1]:.1e}", flush=True)
    return norms, values, unsolved


def solve(objective, leaves: list[Tensor], iterations: int) -> float:
    """Brings `leaves` to where the objective's gradient vanishes, or near; its norm there"""
    optimiser = torch.optim.LBFGS(
        leaves, max_iter=iterations, tolerance_grad=1e-7, tolerance_change=0, history_size=40, line_search_fn="strong_wolfe"
    )

    def slope() -> Tensor:
        optimiser.zero_grad()
        value = objective()
        torch.autograd.backward(value, inputs=leaves)
        return value

    optimiser.step(slope)
    slope()
    return float(sum(x.grad.square().sum() for x in leaves).sqrt())


def bound(values: list[float]) -> np.ndarray:
    """What the theory allows the least norm after T steps: sqrt(2 (F_0 - F_least) / (RATE T)), T = 1, 2, ..."""
    return np.sqrt(2 * (values[0] - min(values)) / RATE / np.arange(1, len(values) + 1))


def figure(norms: dict[str, list[float]], values: dict[str, list[float]], path: Path) -> None:
    picture, axes = new_figure(8, 5)
    names = {"none": "first order", "cg:5": "hypergradient, conjugate gradient, 5 steps"}
    for how, colour in zip(norms, ("#1f5fa8", "#2e8b57")):
        steps = np.arange(1, len(norms[how]) + 1)
        axes.loglog(steps, norms[how], ".", color=colour, alpha=0.35, markersize=4)
        axes.loglog(steps, np.minimum.accumulate(norms[how]), color=colour, label=f"least so far, {names.get(how, how)}")
        axes.loglog(steps, bound(values[how]), color=colour, linestyle="--", label="the theory's rate for it, T^(-1/2)")
    axes.set(xlabel="steps of the basis, T", ylabel="norm of the Riemannian gradient", title="Convergence of the upper level")
    axes.legend()
    picture.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    model = DemoModel()
    calibration = calibrate(model, (SIZE, SIZE), 96)
    curves = {how: run(model, calibration, how, args.steps) for how in ("none", "cg:5")}
    about = meta(f"python -m benchmarks.convergence --steps {args.steps}", model.device, [0])
    result = {"meta": about} | {k: {how: c[i] for how, c in curves.items()} for i, k in enumerate(("norms", "values", "lower"))}
    figure(result["norms"], result["values"], save(args.output, "convergence", result))


if __name__ == "__main__":
    main()
