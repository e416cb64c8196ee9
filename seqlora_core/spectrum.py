"""Spectral spikes: layers in which a LoRA pushes one direction far harder than it pushes its other layers.

A sign of training that has run away, or of a file made to break others in a stack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .adapter import Adapter, LayerDelta
from .linalg import ridge

TOGETHER = 64  # layers: of rank 384 their squares take 150 MB
SPIKE = 10.0  # times the median of an adapter's layers


@dataclass
class Spike:
    """times: the layer's largest singular value over the median of the adapter's layers."""

    layer: str
    times: float


def largest_values(adapter: Adapter) -> dict[str, float]:
    """Layer -> spectral norm of its change: the root of the largest eigenvalue of the r x r matrix up^T up down down^T.

    With up^T up = L L^T that is the symmetric L^T down down^T L's, which is found several times as fast; many layers of one
    rank at a time, since of small ones each call costs more than the work.
    """
    found, alike = {}, {}
    for name, delta in adapter.without_token_tables().layers.items():
        found[name] = 0.0
        if delta.acts:
            alike.setdefault(delta.rank, []).append((name, delta))
    for named in alike.values():
        for start in range(0, len(named), TOGETHER):
            names, deltas = zip(*named[start : start + TOGETHER])
            found |= dict(zip(names, _largest(deltas)))
    return found


def _largest(deltas: tuple[LayerDelta, ...]) -> list[float]:
    """Of changes of one rank"""
    ups, downs = ([m.double() for m in ms] for ms in zip(*((d.up, d.down) for d in deltas)))
    root = torch.linalg.cholesky(ridge(torch.stack([up.mT @ up for up in ups]), 1e-12))
    inner = root.mT @ torch.stack([down @ down.mT for down in downs]) @ root
    return torch.linalg.eigvalsh(inner)[:, -1].clamp_min(0).sqrt().tolist()


def spikes(adapter: Adapter, times: float = SPIKE) -> list[Spike]:
    """Layers above `times` the median, the worst first"""
    values = largest_values(adapter)
    middle = _median(values)
    found = [Spike(name, value / middle) for name, value in values.items() if middle and value > times * middle]
    return sorted(found, key=lambda s: -s.times)


def capped(adapter: Adapter, times: float = SPIKE) -> Adapter:
    """The adapter with every singular value cut to `times` the median of the layers' largest; other layers as they are."""
    values = largest_values(adapter)
    most = times * _median(values)
    layers = {}
    for name, delta in adapter.layers.items():
        layers[name] = delta
        if values.get(name, 0.0) > most > 0:
            left, s, right = _spectrum(delta)
            root, dtype = s.clamp(max=most).sqrt(), delta.down.dtype
            layers[name] = LayerDelta((root[:, None] * right).to(dtype), (left * root).to(dtype), delta.kernel)
    return Adapter(layers, adapter.metadata)


def _median(values: dict[str, float]) -> float:
    return torch.tensor(list(values.values()), dtype=torch.float64).median().item() if values else 0.0


def _spectrum(delta: LayerDelta):
    """U [out, k], s [k], V^T [k, in] of up @ down, in float64"""
    low, lower = torch.linalg.qr(delta.down.double().mT)
    high, upper = torch.linalg.qr(delta.up.double())
    u, s, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return high @ u, s, vh @ low.mT
