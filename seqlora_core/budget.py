"""A budget for how far unrelated prompts may move, held by dual ascent.

The user says how much the loss on unrelated prompts may rise (2 %) and how many concepts are planned; the weight of
everything that protects others follows while training.  One default serves every model: the budget is a share of the
model's own loss.
"""

from __future__ import annotations

import math

RATE = 0.03  # of the ascent, in the logarithm of the weight, a step of training
MEMORY = 0.95  # of the running mean of the measured drift, a step
SAFETY = 0.9  # share of the budget that is spent: some of what moves goes along with the error (docs/RESULTS.md)
LEAST, MOST = 0.05, 1000.0  # of the weight
LEAST_SHARE = 0.5  # of a concept's share, which it has even where earlier ones spent all
OVERSPENT = 1.5  # times their part of the budget: from there on it is told


class Budget:
    """The weight that keeps `drift` under its share.

    For min L subject to drift <= allowed, the Lagrangian's multiplier rises while the constraint is broken and falls
    while it is slack (Boyd and Vandenberghe, "Convex Optimization", section 5.5); here in the logarithm, so that it
    stays positive and needs no scale of its own.

    total: mean squared change of the prediction that `planned` concepts may cause together.  A prediction that moves
    by d, unrelated to its error, raises the loss by E|d|^2; so total = budget * the base model's loss, less a margin.
    every: steps from one update to the next.  spent: mean squared change that one earlier concept causes already.
    """

    def __init__(self, budget: float, base_loss: float, planned: int, every: int = 1, spent: float = 0.0):
        self.total, self.weight = SAFETY * budget * base_loss, 1.0
        self.share, self.spent, self.base_loss = self.total / planned, spent, base_loss
        self.rate, self.memory = every * RATE, MEMORY**every
        self.ratio: float | None = None  # running mean of drift over what was allowed

    def allowed(self, concepts: int) -> float:
        """What this many concepts, the new one included, may change together: their part of the whole.

        Where the others change more than theirs, as those that were taught without a budget, the new one need not make
        up for all of it: no weight could, and it would learn nothing.
        """
        return max(min(self.total, concepts * self.share), (concepts - 1) * self.spent + LEAST_SHARE * self.share)

    def notes(self, earlier: int) -> list[str]:
        """What its user should know of the concepts before this one"""
        theirs = min(self.total, earlier * self.share)
        if earlier * self.spent <= OVERSPENT * theirs:
            return []
        moved, part = (f"{x / self.base_loss:.1%}" for x in (earlier * self.spent, theirs))
        return [
            f"what was taught before ({earlier}) moves unrelated prompts by about {moved} already, where {part} is its part of "
            "the budget: this concept gets half of its own; for more, allow more drift, or teach the strongest anew"
        ]

    def update(self, drift: float, concepts: int) -> None:
        """drift: as just measured with `concepts` of them on, the new one included."""
        ratio = drift / self.allowed(concepts)
        self.ratio = ratio if self.ratio is None else self.memory * self.ratio + (1 - self.memory) * ratio
        step = self.rate * max(-1.0, min(1.0, math.log(max(self.ratio, 1e-9))))
        self.weight = max(LEAST, min(MOST, self.weight * math.exp(step)))
