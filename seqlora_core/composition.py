"""Many adapters, one change: plain sums, norm control, and projections that keep concepts apart."""

from __future__ import annotations

import torch
from torch import Tensor

from .adapter import Adapter, LayerDelta, concatenate
from .errors import UserError
from .linalg import orthonormal_basis, project_out, ridge
from .statistics import Moments

MODES = ("sum", "weights", "data")
RIDGE = 1e-2


def compose(
    adapters: list[Adapter], strengths: list[float] | None = None, mode: str = "sum", amount: float = 1.0,
    moments: list[Moments] | None = None, general: Moments | None = None, beta: float = 1.0,
) -> Adapter:  # fmt: skip
    """One adapter of summed rank that does what all of them, projected by `project`, do together."""
    if not adapters:
        raise UserError("nothing to stack: name at least one concept")
    strengths = [1.0] * len(adapters) if strengths is None else strengths
    projected = project(adapters, mode, amount, moments, general, beta)
    return concatenate([p.scaled(s) for p, s in zip(projected, strengths)])


def project(
    adapters: list[Adapter], mode: str = "sum", amount: float = 1.0, moments: list[Moments] | None = None,
    general: Moments | None = None, beta: float = 1.0,
) -> list[Adapter]:  # fmt: skip
    """Each adapter as it goes into the stack, at strength 1.

    mode: "sum", what SeqLoRA's concepts are trained for; "weights", Gram-Schmidt of the lora_down rows in the
    order given, needs no data; "data", the closed form with each concept's `moments` (and `general` ones, G).
    amount 0..1 goes from the plain sum to the full projection.
    """
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}: use one of {', '.join(MODES)}")
    if not 0 <= amount <= 1:
        raise UserError(f"amount is {amount}: give a number from 0 to 1")
    if mode == "weights":
        projected = gram_schmidt(adapters)
    elif mode == "data":
        if moments is None:
            raise UserError(
                "mode 'data' needs each concept's statistics file (NAME.stats.safetensors) beside it; use 'sum' or 'weights'"
            )
        projected = closed_form(adapters, moments, general, beta)
    else:
        projected = adapters
    return [_mix(a, p, amount) for a, p in zip(adapters, projected)]


def gram_schmidt(adapters: list[Adapter]) -> list[Adapter]:
    """Each adapter's lora_down rows with the row spaces of all earlier ones taken out (in plain weight space)."""
    taken: dict[str, Tensor] = {}
    out = []
    for adapter in adapters:
        layers = {}
        for name, delta in adapter.layers.items():
            down = project_out(delta.down.mT, taken.get(name)).mT
            layers[name] = LayerDelta(down, delta.up)
            both = delta.down.mT if name not in taken else torch.cat([taken[name], delta.down.mT], 1)
            taken[name] = orthonormal_basis(both)[:, : both.shape[0]]
        out.append(Adapter(layers, adapter.metadata))
    return out


def closed_form(
    adapters: list[Adapter], moments: list[Moments], general: Moments | None = None, beta: float = 1.0
) -> list[Adapter]:
    """`D_i' = D_i S_i (S_i + beta (sum_{j != i} S_j + G) + ridge)^(-1)`; lora_up and rank stay.

    The minimiser, layer by layer, of what the projection changes on a concept's own inputs plus beta times what
    it does on everyone else's (one row of a RegMean solution, Jin et al. 2023).  Independent of order.
    """
    out = [Adapter({}, a.metadata) for a in adapters]
    for name in dict.fromkeys(n for a in adapters for n in a.layers):
        everything = sum(m[name].double() for m in moments)
        if general is not None:
            everything = everything + general[name].double()
        for adapter, moment, fitted in zip(adapters, moments, out):
            if name in adapter.layers:
                delta, own = adapter.layers[name], moment[name].double()
                system = ridge(own + beta * (everything - own), RIDGE)
                down = torch.linalg.solve(system, own @ delta.down.double().mT).mT
                fitted.layers[name] = LayerDelta(down.to(delta.down.dtype), delta.up)
    return out


def norm_controlled(adapters: list[Adapter]) -> list[Adapter]:
    """Each adapter over the square root of their number: the sum keeps one adapter's energy if they are unrelated."""
    return [a.scaled(len(adapters) ** -0.5) for a in adapters]


def _mix(plain: Adapter, projected: Adapter, amount: float) -> Adapter:
    if amount == 1.0 or plain is projected:
        return projected
    layers = {n: LayerDelta(torch.lerp(d.down, projected.layers[n].down, amount), d.up) for n, d in plain.layers.items()}
    return Adapter(layers, plain.metadata)
