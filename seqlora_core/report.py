"""Who disturbs whom in a stack, before a picture is drawn: a report as data and as text.  plots.py draws it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .adapter import Adapter, joined
from .errors import UserError
from .interference import dense_energy, energies, overlaps
from .spectrum import spikes
from .statistics import Moments
from .triggers import shared_triggers

DISTURBED = 0.25  # of a concept's own effect, from which a pair is worth a word
LEFT = 0.5  # of a concept's own energy, below which a projection is
LISTED = 12  # concepts up to which the text shows the whole matrix
PAIRS = 5  # worst pairs that are named
LEAST = 1e-30


@dataclass
class Report:
    """Interference of a stack, as data.  Rows disturb, columns are disturbed.

    crosstalk[i][j]: energy of concept i's change on concept j's inputs, as a share of what j itself does there at strength
    1; summed over layers.  None if not all moments are known.  overlap[i][j]: shared input directions as a multiple of
    chance, mean over layers: from the weights alone.  *_after: the same with the projection `mode`; the share is of what j
    does unprojected.  disturbance[j]: what the whole stack does to j's layers that j alone would not, as a share of what a
    concept of the stack does on average, at strength 1: one measure for all, which ranks their losses (docs/RESULTS.md).
    energy_kept[i]: of i's own energy, on its own inputs (of its weights, without moments).
    """

    names: list[str]
    crosstalk: list[list[float]] | None
    overlap: list[list[float]]
    mode: str = "sum"
    crosstalk_after: list[list[float]] | None = None
    overlap_after: list[list[float]] | None = None
    disturbance: list[float] | None = None
    disturbance_after: list[float] | None = None
    energy_kept: list[float] | None = None
    worst: list[dict] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """Whether it rests on moments, not on the weights alone"""
        return self.crosstalk is not None

    @property
    def before(self) -> list[list[float]]:
        """Of the plain sum: crosstalk if it is measured, else overlap"""
        return self.crosstalk if self.measured else self.overlap

    @property
    def after(self) -> list[list[float]] | None:
        """The same with the projection; None without one"""
        return self.crosstalk_after if self.measured else self.overlap_after

    def text(self) -> str:
        """The matrix of few concepts, or the most disturbed of many; the worst pairs; advice."""
        what = "share of a concept's own effect that another adds on its inputs"
        lines = [
            f"crosstalk: {what}"
            if self.measured
            else "overlap of input directions, in multiples of chance (from weights alone)"
        ]
        width = max(len(n) for n in self.names)
        if len(self.names) <= LISTED:
            for title, matrix in (("as a plain sum", self.before), (f"with mode '{self.mode}'", self.after)):
                if matrix is not None:
                    lines.append(title if self.after is not None else "rows disturb, columns are disturbed")
                    lines += [f"{n:>{width}}  " + " ".join(f"{v:7.3f}" for v in row) for n, row in zip(self.names, matrix)]
        if self.measured:
            lines.append("moved by all others together, the most first" + (f" -> with '{self.mode}'" if self.after else ""))
            order = sorted(range(len(self.names)), key=lambda j: -self.disturbance[j])
            for j in order[:LISTED]:
                then = f" -> {percent(self.disturbance_after[j])}" if self.after else ""
                lines.append(f"{self.names[j]:>{width}}  {percent(self.disturbance[j])}{then}")
        for pair in self.worst:
            then = "" if pair["after"] is None else f" -> {self._value(pair['after'])}"
            layers = f", most in {', '.join(pair['layers'])}" if pair["layers"] else ""
            lines.append(f"{pair['source']} on {pair['target']}: {self._value(pair['before'])}{then}{layers}")
        return "\n".join([*lines, *filter(None, [self.kept]), *self.advice])

    @property
    def kept(self) -> str:
        """What the projection leaves of each concept's own energy, of many the least; empty without a projection"""
        if self.energy_kept is None:
            return ""
        where = "on its own inputs" if self.measured else "of its weights"
        order = sorted(range(len(self.names)), key=lambda i: self.energy_kept[i])
        said = ", ".join(f"{self.names[i]} {self.energy_kept[i]:.0%}" for i in order[:LISTED])
        return f"energy {where} that mode '{self.mode}' keeps, the least first: {said}"

    def _value(self, value: float) -> str:
        return percent(value) if self.measured else f"{value:.1f} x chance"


def percent(value: float) -> str:
    """A share as people read it: "<1%", "35%", "12 times" """
    if value >= 10:
        return f"{value:.0f} times"
    return "<1%" if 0 < value < 0.005 else f"{value:.0%}"


def interference_report(
    adapters: dict[str, Adapter], moments: dict[str, Moments] | None = None, strengths: list[float] | None = None,
    projected: list[Adapter] | None = None, mode: str = "sum", asked: list[float] | None = None, meet: Tensor | None = None,
) -> Report:  # fmt: skip
    """Who disturbs whom, before any picture is drawn.

    adapters: name -> adapter at strength 1.  moments: name -> second moments of the inputs that concept sees; None (or
    a name missing) leaves only what the weights say.  projected: the adapters as `composition.project` makes them with
    `mode`, at strength 1.  asked: the strengths as their user set them, if something else scales them too: advice is in these.
    meet: [N, N], whether two ever act at the same time; None: all do.
    """
    names, plain = list(adapters), list(adapters.values())
    strengths = [1.0] * len(names) if strengths is None else strengths
    if not names or len(strengths) != len(names):
        raise UserError(
            f"{len(strengths)} strengths for {len(names)} adapters: give at least one adapter, and a strength for each"
        )
    known = moments is not None and all(n in moments for n in names)
    seen = [moments[n] for n in names] if known else None
    meet = torch.ones(len(names), len(names), dtype=torch.bool) if meet is None else meet
    before = _Sums(plain, plain, seen, strengths, meet)
    report = Report(names, None, before.overlap().tolist())
    if known:
        own = before.own()
        report.crosstalk, report.disturbance = before.crosstalk(own), before.disturbance(own)
    after = None
    if projected is not None and mode != "sum":
        after = _Sums(projected, plain, seen, strengths, meet)
        report.mode, report.overlap_after = mode, after.overlap().tolist()
        kept = before.own()
        report.energy_kept = (after.own() / kept).where(kept > LEAST, 1.0).tolist()
        if known:
            report.crosstalk_after, report.disturbance_after = after.crosstalk(own), after.disturbance(own)
    report.worst = _worst(report, before, after)
    report.advice = _advice(report, asked or strengths)
    report.advice += [
        f"{' and '.join(called[:4])}{' and others' if len(called) > 4 else ''} share the trigger {words!r}: "
        "one prompt word calls them all, give each its own."
        for words, called in shared_triggers({n: a.metadata for n, a in adapters.items()})
    ]
    for name, adapter in adapters.items():
        found = spikes(adapter)
        if found:
            report.advice.append(
                f"{name} pushes {found[0].layer} {found[0].times:.0f} times as hard as its middle layer"
                f"{f', and {len(found) - 1} more layers' if found[1:] else ''}: a sign of training that ran away; "
                "Apply Stack's cap, or 'seqlora stack --cap 10', cuts it down."
            )
    missing = [n for n in names if moments and n not in moments]
    if missing:
        report.advice.append(f"no moments of {', '.join(missing[:4])}: calibrate to see what is really disturbed.")
    return report


class _Sums:
    """What a report needs of one stack, added up layer by layer.

    stack: adapters at strength 1, projected or not; plain: the same unprojected; moments: of each one's inputs, or None;
    meet: [N, N], whether two ever act at the same time.
    """

    def __init__(
        self, stack: list[Adapter], plain: list[Adapter], moments: list[Moments] | None, strengths: list[float], meet: Tensor
    ):  # fmt: skip
        self.layers = list(dict.fromkeys(n for a in plain for n in a.without_token_tables().layers))
        self.square = torch.tensor(strengths, dtype=torch.float64).square()[:, None]
        self.stack, self.energies, self.alike, self.meet = stack, [], [], meet  # of each layer, [N, N]
        self.moved = torch.zeros(len(stack), dtype=torch.float64)
        for name in self.layers:
            own = [a.layers[name].float() if name in a.layers else None for a in plain]
            deltas = own if stack is plain else [a.layers[name].float() if name in a.layers else None for a in stack]
            self.alike.append(overlaps(deltas))
            if moments is not None:
                seen = [m.layers.get(name) for m in moments]
                width = next((len(s) for s in seen if s is not None), None)
                deltas, own = ([d and width and d.by_channel(width) for d in ds] for ds in (deltas, own))
                self.energies.append(energies(deltas, seen))
                self.moved += _moved(deltas, own, stack is plain, seen, strengths, meet)

    def own(self) -> Tensor:
        """Energy of each on its own inputs; of its weights, where no moments are known"""
        if self.energies:
            return sum(self.energies).diagonal()
        layers = [[d.float().energy() for n, d in a.layers.items() if n in self.layers] for a in self.stack]
        return torch.tensor([float(sum(some)) for some in layers], dtype=torch.float64)

    def crosstalk(self, own: Tensor) -> list[list[float]]:
        """0 for those that have no low-rank effect to be moved"""
        total = sum(self.energies, torch.zeros(len(own), len(own))) * self.meet
        return (self.square * total / own.where(own > LEAST, torch.inf)).tolist()

    def disturbance(self, own: Tensor) -> list[float]:
        some = own[own > LEAST]
        return (self.moved / (some.mean() if len(some) else 1.0)).tolist()

    def overlap(self) -> Tensor:
        if not self.alike:
            return torch.zeros(len(self.stack), len(self.stack), dtype=torch.float64)
        return torch.stack(self.alike).nanmean(0).nan_to_num(0.0) * self.meet

    def causes(self, source: int, target: int) -> list[str]:
        """The layers that cause most of a pair's figure: as few as make half of it, at most three"""
        tables = self.energies or self.alike
        values = torch.stack([t[source, target] for t in tables]).nan_to_num(0.0)
        order = values.argsort(descending=True)
        shares = values[order].cumsum(0) / values.sum().clamp_min(LEAST)
        count = min(3, int((shares < 0.5).sum()) + 1)
        return [self.layers[i].removeprefix("diffusion_model.").removeprefix("lora_unet_") for i in order[:count].tolist()]


def _moved(deltas: list, own: list, plain: bool, seen: list, strengths: list[float], meet: Tensor) -> Tensor:
    """[j]: energy on j's inputs, in one layer, of all that the stack does there while j acts and j alone would not.

    By r x r products where that has far fewer directions than the weight, else by the weight's own change.
    plain: the stack is not projected, so that j alone does just what it does there.
    """
    out = torch.zeros(len(seen), dtype=torch.float64)
    everything = {i: replace(d, up=d.up * s) for i, (d, s) in enumerate(zip(deltas, strengths)) if d is not None}
    wholes: dict[tuple[int, ...], Tensor] = {}
    for j, moment in enumerate(seen):
        unchanged = plain or deltas[j] is own[j]
        parts = {i: p for i, p in everything.items() if meet[i, j]}
        others = [p for i, p in parts.items() if not (unchanged and i == j)]
        if own[j] is not None and not unchanged:
            others.append(replace(own[j], up=own[j].up * -strengths[j]))
        if moment is None or not others:
            continue
        if sum(p.rank for p in others) < min(others[0].shape) / 2:
            out[j] = energies([joined(others)], [moment])[0, 0].clamp_min(0)
            continue
        if tuple(parts) not in wholes:
            wholes[tuple(parts)] = sum(p.dense() for p in parts.values())
        whole = wholes[tuple(parts)]
        out[j] = dense_energy(whole if own[j] is None else whole - strengths[j] * own[j].dense(), moment)
    return out


def _worst(report: Report, before: _Sums, after: _Sums | None) -> list[dict]:
    """The pairs with the largest figures: as a plain sum, since that is what a projection has to repair.  layers: that cause
    it as a plain sum; layers_after: what is left of it with the projection"""
    matrix, names = torch.tensor(report.before), report.names
    matrix.fill_diagonal_(-1)
    if not report.measured:
        matrix = matrix.triu()  # an overlap has no direction
    out = []
    for index in matrix.flatten().argsort(descending=True, stable=True)[:PAIRS].tolist():
        i, j = divmod(index, len(names))
        if matrix[i, j] > 0:
            then = None if report.after is None else report.after[i][j]
            pair = {"source": names[i], "target": names[j], "before": report.before[i][j], "after": then}
            out.append(pair | {"layers": before.causes(i, j), "layers_after": after and after.causes(i, j)})
    return out


def _advice(report: Report, strengths: list[float]) -> list[str]:
    """A sentence for each thing that is worth doing, the most useful first"""
    if not report.measured:
        return ["the weights alone tell who reads the same directions, not who is disturbed: calibrate the LoRAs to see that."]
    out, now = [], report.disturbance_after or report.disturbance
    worst = max(range(len(now)), key=lambda j: now[j])
    if report.after is not None and report.disturbance[worst] > DISTURBED:
        out.append(
            f"the others move {report.names[worst]} by {percent(report.disturbance[worst])} of a concept's own effect as a plain sum, "
            f"by {percent(now[worst])} with mode '{report.mode}'."
        )
    elif report.after is not None and now[worst] > DISTURBED:
        out.append(
            f"the others move {report.names[worst]} by {percent(now[worst])} of a concept's own effect with mode '{report.mode}', and by "
            f"{percent(report.disturbance[worst])} as a plain sum: use mode 'sum'."
        )
    elif now[worst] > DISTURBED:
        out.append(
            f"the others move {report.names[worst]} by {percent(now[worst])} of a concept's own effect: try Apply Stack's mode 'data', "
            "and look here with it."
        )
    for pair in report.worst[:3]:
        told = "before" if pair["after"] is None else "after"
        value, layers = pair[told], pair["layers" if told == "before" else "layers_after"]
        if value > DISTURBED:
            strength = strengths[report.names.index(pair["source"])]
            lower = strength * (DISTURBED / value) ** 0.5
            what = (
                f"lower {pair['source']} to {lower:.2g} or leave it out"
                if abs(lower) >= 0.15
                else f"leave {pair['source']} out"
            )
            out.append(
                f"{pair['source']} moves {pair['target']} by {percent(value)} of its own effect, most in {layers[0]}: {what}."
            )
    weak = [(kept, name) for name, kept in zip(report.names, report.energy_kept or []) if kept < LEFT]
    if weak:
        kept, name = min(weak)
        more = f" ({len(weak)} are below {LEFT:.0%})" if len(weak) > 1 else ""
        out.append(
            f"mode '{report.mode}' leaves {kept:.0%} of what {name} does on its own inputs{more}: raise its strength, or leave out what "
            "it is like."
        )
    return out
