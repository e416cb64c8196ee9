"""Many adapters, one change: plain sums, norm control, and projections that keep concepts apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter import Adapter, LayerDelta, channel_rows, concatenate, kernel_rows
from .errors import UserError
from .linalg import acting_directions, nearest_frame, project_out, ridge, span
from .sketch import RidgedInverse, Sketch, products
from .spectrum import capped
from .statistics import Moments

MODES = ("sum", "weights", "data")
ORDERS = ("symmetric", "first", "strongest")
RIDGE = 1e-2
LARGEST_STRENGTH = 1000
LEAST_KEPT = 1e-2  # of its energy, when a projected adapter is scaled back: where less is left, that may be rounding


@dataclass(frozen=True)
class Wishes:
    """What a user may ask of a projection besides its mode and amount.

    order: of mode "weights"; "symmetric" treats all alike, "first" leaves the first whole and "strongest" the one of most
    energy, each later one gives way to all before it.  protected: places in the stack that are left whole, the others give
    way.  restore: scale each projected adapter back to the energy it had, at most tenfold.  cap: singular values
    above so many times the median of an adapter's layers are cut before the projection (`spectrum.capped`), at least 1; not of
    protected ones.
    undivided: `without_data` does not divide by their number's root, as norm control will (`norm_shares`).
    """

    order: str = "symmetric"
    protected: frozenset[int] = frozenset()
    restore: bool = False
    cap: float | None = None
    undivided: bool = False


def compose(
    adapters: list[Adapter], strengths: list[float] | None = None, mode: str = "sum", amount: float = 1.0,
    moments: list[Moments] | None = None, general: Moments | None = None, beta: float = 1.0, wishes: Wishes = Wishes(),
) -> Adapter:  # fmt: skip
    """One adapter of summed rank that does what all of them, projected by `project`, do together.

    strengths: one for each; None: 1.  UserError for none to stack, for strengths that are no numbers or too large, and as
    `project`.
    """
    if not adapters:
        raise UserError("nothing to stack: name at least one concept")
    strengths = [1.0] * len(adapters) if strengths is None else strengths
    if len(strengths) != len(adapters):
        raise UserError(f"{len(strengths)} strengths for {len(adapters)} adapters: give one for each")
    for number, strength in enumerate(strengths):
        check_strength(f"adapter {number}", strength)
    projected = project(adapters, mode, amount, moments, general, beta, wishes)
    return concatenate([p.scaled(s) for p, s in zip(projected, strengths)])


def check_strength(name: str, strength: float) -> None:
    """UserError for what is no number, or one that would drown everything else"""
    if not abs(strength) <= LARGEST_STRENGTH:
        raise UserError(f"the strength of {name} is {strength:g}: give a number such as 0.8, at most {LARGEST_STRENGTH}")


def project(
    adapters: list[Adapter], mode: str = "sum", amount: float = 1.0, moments: list[Moments] | None = None,
    general: Moments | None = None, beta: float = 1.0, wishes: Wishes = Wishes(),
) -> list[Adapter]:  # fmt: skip
    """Each adapter as it goes into the stack, at strength 1.

    mode: "sum", what SeqLoRA's concepts are trained for; "weights", the rows of lora_down made orthogonal between
    adapters and all over the square root of their number, needs no data; "data", the closed form with each concept's `moments`
    (and `general` ones, G).  amount 0..1 goes from the plain sum to the full projection.  UserError for other modes, orders,
    amounts and caps, and for "data" without the moments of each.
    """
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")
    if wishes.order not in ORDERS:
        raise UserError(f"unknown order {wishes.order!r}: use one of {', '.join(ORDERS)}")
    if not 0 <= amount <= 1:
        raise UserError(f"amount is {amount}: give a number from 0 to 1")
    if wishes.cap is not None:
        if not wishes.cap >= 1:
            raise UserError(f"cap is {wishes.cap}: give a number of at least 1, such as 10")
        adapters = [a if i in wishes.protected else capped(a, wishes.cap) for i, a in enumerate(adapters)]
    by_weights = symmetric if wishes.undivided else without_data
    if mode == "weights" and wishes.order == "symmetric":
        projected = _with_token_tables(by_weights, adapters, wishes.protected)
    elif mode == "weights":
        order = sequence(adapters, wishes.order)
        projected = _with_token_tables(gram_schmidt, adapters, order, wishes.protected)
    elif mode == "data":
        if moments is None:
            raise UserError(
                "mode 'data' needs the moments of what each adapter sees: calibrate them first, or use 'sum' or 'weights'"
            )
        if len(moments) != len(adapters):
            raise UserError(f"moments of {len(moments)} adapters for {len(adapters)}: give those of each")
        projected = _with_token_tables(closed_form, adapters, moments, general, beta, wishes.protected, by_weights)
    else:
        projected = adapters
    mixed = [_mix(a, p, amount) for a, p in zip(adapters, projected)]
    if wishes.restore:
        mixed = [m if m is a else _restored(a, m) for a, m in zip(adapters, mixed)]
    return mixed


def _restored(before: Adapter, after: Adapter) -> Adapter:
    """Scaled back to the energy that it had"""
    return shared(after, max(energy_kept(before, after), LEAST_KEPT) ** -0.5)


def _with_token_tables(projection: Callable[..., list[Adapter]], adapters: list[Adapter], *options) -> list[Adapter]:
    """The projection of all layers but token tables, which go in as they are: each acts on its own trigger alone."""
    projected = projection([a.without_token_tables() for a in adapters], *options)
    return [Adapter(a.layers | p.layers, a.metadata) for a, p in zip(adapters, projected)]


def sequence(adapters: list[Adapter], order: str) -> list[int]:
    """Who comes first in a sequential projection."""
    places = list(range(len(adapters)))
    if order == "strongest":
        energies = [float(sum(d.energy() for d in a.layers.values())) for a in adapters]
        places.sort(key=lambda i: -energies[i])
    return places


def gram_schmidt(adapters: list[Adapter], order: Iterable[int] | None = None, protected: Collection[int] = ()) -> list[Adapter]:
    """Each adapter's lora_down rows with the row spaces of all earlier ones taken out (in plain weight space).

    A change that does nothing takes no directions.
    """
    taken: dict[str, Tensor] = {}
    out = [Adapter({}, a.metadata) for a in adapters]
    order = range(len(adapters)) if order is None else order
    for i in [*sorted(protected), *(i for i in order if i not in protected)]:
        for name, delta in adapters[i].layers.items():
            free = project_out(delta.down.double().mT, taken.get(name))
            out[i].layers[name] = delta if i in protected else replace(delta, down=free.mT.to(delta.down.dtype))
            if not delta.acts:
                continue
            fresh = span(project_out(_directions(delta), taken.get(name)), 1.0)
            taken[name] = torch.cat([taken[name], fresh], 1) if name in taken else fresh
    return out


def symmetric(adapters: list[Adapter], protected: Collection[int] = ()) -> list[Adapter]:
    """Each adapter's lora_down rows within a subspace of its own, orthogonal to all others'; independent of order.

    The input directions v of every adapter (right singular vectors of its change) are moved together to the nearest
    orthonormal ones q: the q minimise `sum energy(v) |q - v|^2` (Löwdin's symmetric orthogonalisation, weighted), so
    that what acts strongly moves least.  Then `D_i' = D_i Q_i Q_i^T`.  Where the ranks' sum passes the layer's width,
    directions are shared.  A change that does nothing stays as it is, and nobody gives way to it.
    """
    out = [Adapter({}, a.metadata) for a in adapters]
    for name in dict.fromkeys(n for a in adapters for n in a.layers):
        members = [i for i, a in enumerate(adapters) if name in a.layers]
        for i in members:
            out[i].layers[name] = adapters[i].layers[name]
        members = [i for i in members if adapters[i].layers[name].acts]
        whole = [i for i in members if i in protected]
        occupied = span(torch.cat([_directions(adapters[i].layers[name]) for i in whole], 1), 1.0) if whole else None
        parts = [i for i in members if i not in protected]
        if not parts:
            continue
        weighted = [project_out(_directions(adapters[i].layers[name], weighted=True), occupied) for i in parts]
        largest = max(w.norm(dim=0).max() for w in weighted).clamp_min(torch.finfo(torch.float64).tiny)
        frames = nearest_frame(torch.cat(weighted, 1) / largest).split([w.shape[1] for w in weighted], 1)
        for i, frame in zip(parts, frames):
            delta = adapters[i].layers[name]
            frame = frame.to(delta.down.dtype)
            out[i].layers[name] = replace(delta, down=(delta.down @ frame) @ frame.mT)
    return out


def without_data(adapters: list[Adapter], protected: Collection[int] = ()) -> list[Adapter]:
    """`symmetric`, in each layer over the square root of the number of adapters that give way there.

    All inputs of a layer lie mostly in few directions, which every LoRA reads whatever its lora_down: that part no
    projection by weights can tell apart, so the sum is kept at one adapter's strength (docs/RESULTS.md has what was tried).
    """
    counts = Counter(n for i, a in enumerate(adapters) if i not in protected for n, d in a.layers.items() if d.acts)
    return [
        p
        if i in protected
        else Adapter({n: replace(d, down=d.down * max(1, counts[n]) ** -0.5) for n, d in p.layers.items()}, p.metadata)
        for i, p in enumerate(symmetric(adapters, protected))
    ]


def _directions(delta: LayerDelta, weighted: bool = False) -> Tensor:
    """Orthonormal input directions in which a change acts [in, r], or all, weighted by their energies; in float64"""
    basis, energies = acting_directions(delta.down, delta.up)
    return basis * energies if weighted else basis[:, energies > 0]


def closed_form(
    adapters: list[Adapter], moments: list[Moments], general: Moments | None = None, beta: float = 1.0,
    protected: Collection[int] = (), by_weights: Callable[..., list[Adapter]] = without_data,
) -> list[Adapter]:  # fmt: skip
    """`D_i' = D_i S_i (S_i + beta (sum_{j != i} S_j + G) + ridge)^(-1)`; lora_up and rank stay.

    The minimiser, layer by layer, of what the projection changes on a concept's own inputs plus beta times what
    it does on everyone else's (one row of a RegMean solution, Jin et al. 2023).  Independent of order.  A layer in
    which one adapter's inputs were not recorded is projected from the weights (`by_weights`).  Sketched moments stay so.
    """
    out = [Adapter({}, a.metadata) for a in adapters]
    unseen = {n for a, m in zip(adapters, moments) for n in a.layers if n not in m.layers}
    for name in dict.fromkeys(n for a in adapters for n in a.layers if n not in unseen):
        places = [i for i, m in enumerate(moments) if name in m.layers]
        seen = [moments[i].layers[name] for i in places]
        others = [] if general is None or name not in general.layers else [general.layers[name]]
        inverse_for, inverse = _inverses([*seen, *others], beta), None
        for place, i in enumerate(places):
            delta = adapters[i].layers.get(name)
            if delta is None:
                continue
            if i in protected:
                out[i].layers[name] = delta
                continue
            if beta != 1 or inverse is None:  # with beta 1 one and the same for all
                inverse = inverse_for(place)
            own = seen[place]
            matrix = own.operator().to(torch.float64) if isinstance(own, Sketch) else own.double()
            rows = channel_rows(delta.down.double(), len(own))
            down = kernel_rows(inverse(matrix @ rows.mT).mT, delta.rank)
            out[i].layers[name] = replace(delta, down=down.to(delta.down.dtype))
    if unseen:
        rest = [Adapter({n: d for n, d in a.layers.items() if n in unseen}) for a in adapters]
        for fitted, other in zip(out, by_weights(rest, protected)):
            fitted.layers.update(other.layers)
    return out


def _inverses(seen: list[Tensor | Sketch], beta: float) -> Callable[[int], Callable[[Tensor], Tensor]]:
    """i -> what multiplies by `(S_i + beta sum_{j != i} S_j + ridge)^(-1)`, in float64"""
    if all(isinstance(s, Sketch) for s in seen) and sum(len(s.values) for s in seen) < len(seen[0]):
        grams = products(seen)
        return lambda i: RidgedInverse(seen, [1.0 if i == j else beta for j in range(len(seen))], grams, RIDGE).__matmul__

    def matrix(s: Tensor | Sketch) -> Tensor:
        return (s.dense() if isinstance(s, Sketch) else s).double()

    everything = sum(map(matrix, seen))

    def inverse_for(i: int) -> Callable[[Tensor], Tensor]:
        own = matrix(seen[i])
        factor = torch.linalg.cholesky(ridge(own + beta * (everything - own), RIDGE))
        return lambda x: torch.cholesky_solve(x, factor)

    return inverse_for


def norm_controlled(adapters: list[Adapter]) -> list[Adapter]:
    """Each adapter over the square root of their number: the sum keeps one adapter's energy if they are unrelated."""
    return [shared(a, s) for a, s in zip(adapters, norm_shares(len(adapters)))]


def shared(adapter: Adapter, share: float) -> Adapter:
    """`share` of an adapter, but for its token tables: each acts on its own trigger alone"""
    if share == 1:
        return adapter
    return Adapter(adapter.layers | adapter.without_token_tables().scaled(share).layers, adapter.metadata)


def norm_shares(count: int, protected: Collection[int] = ()) -> list[float]:
    """What norm control multiplies each of `count` adapters by: 1 of the protected ones, of the others one over their number's root"""
    root = max(1, count - len(protected)) ** -0.5
    return [1.0 if i in protected else root for i in range(count)]


def energy_kept(before: Adapter, after: Adapter) -> float:
    """Energy (squared Frobenius norm of the change, over all layers) that a projection leaves, as a share."""
    if before is after:
        return 1.0
    before, after = before.without_token_tables(), after.without_token_tables()
    total = float(sum(d.energy() for d in before.layers.values()))
    return float(sum(d.energy() for d in after.layers.values())) / total if total else 1.0


def _mix(plain: Adapter, projected: Adapter, amount: float) -> Adapter:
    if amount == 1.0 or plain is projected:
        return projected
    layers = {n: replace(d, down=torch.lerp(d.down, projected.layers[n].down, amount)) for n, d in plain.layers.items()}
    return Adapter(layers, plain.metadata)
