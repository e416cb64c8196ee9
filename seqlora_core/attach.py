"""Adapters and recorders on a live model, by forward hooks: its weights are never touched.

A `Site` is where one adapter layer acts: usually one module, or several whose outputs are slices of the layer's
output (diffusers' separate q, k, v under a file's fused qkv).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .adapter import Adapter


def _as_it_is(module: nn.Module) -> Tensor:
    return module.weight


@dataclass(frozen=True)
class Site:
    """One adaptable layer.  `modules` all read the same input; their outputs, concatenated, are the layer's.

    A convolution is a layer of its input channels: it can be recorded, not trained.  A text encoder's token table is a
    layer whose input is token ids: what is added to a token's embedding is its row of the change.
    """

    name: str
    modules: tuple[nn.Module, ...]
    in_features: int
    out_features: int
    first: int = 0  # which of the modules a forward pass calls first
    read: Callable[[nn.Module], Tensor] = _as_it_is  # a module's weight as the numbers that it multiplies by

    def weight_energy(self, moment: Tensor) -> Tensor:
        """`tr(W S W^T)`: the energy of the layer's own output on inputs of second moment S [in, in]."""
        total = moment.new_zeros(())
        for module in self.modules:
            w = self.read(module).detach().to(moment)
            total = total + ((w @ moment) * w).sum()
        return total


class Attachment:
    """What is added to the layers' outputs; change its fields between forward passes.

    live: layer -> (down [r, in], up [out, r]) being trained; gradients flow.
    frozen: layer -> (down, up) of other concepts, concatenated; mask [sum of ranks] switches them.
    record: called with (layer name, input) for each layer, or None.
    """

    def __init__(self) -> None:
        self.live: dict[str, tuple[Tensor, Tensor]] = {}
        self.frozen: dict[str, tuple[Tensor, Tensor]] = {}
        self.mask: dict[str, Tensor] = {}
        self.record: Callable[[str, Tensor], None] | None = None
        self._low: list[tuple[Tensor, Tensor]] = []

    def set_frozen(self, adapter: Adapter | None, device=None) -> None:
        """This adapter, whole, is what is added from now on; None: nothing of others"""
        layers = adapter.layers if adapter is not None else {}
        self.frozen = {n: (d.down.to(device), d.up.to(device)) for n, d in layers.items()}
        self.mask = {}

    def delta(self, name: str, x: Tensor, rows: slice, first: bool = True) -> Tensor | None:
        """What is added to the layer's outputs `rows`, for its input x.  Not `first`: x is that of the call before."""
        tokens = not x.is_floating_point()
        if first:
            self._low = []
            for pair, mask in ((self.frozen.get(name), self.mask.get(name)), (self.live.get(name), None)):
                if pair is not None:
                    down, up = pair
                    # a text encoder may live on another device than the model, as ComfyUI has it on small cards
                    low = up[x.to(up.device)] if tokens else x.to(down) @ down.mT
                    self._low.append((low if mask is None else low * mask, down if tokens else up))
        total = None
        for low, other in self._low:
            part = low @ (other if tokens else other[rows].mT)
            total = part if total is None else total + part
        return total


@contextlib.contextmanager
def attached(sites: list[Site], attachment: Attachment):
    """Hooks for the length of a `with` block; none is left behind, whatever happens inside."""
    handles = []
    try:
        for site in sites:
            start = 0
            for index, module in enumerate(site.modules):
                rows = slice(start, start + module.weight.shape[0])
                start = rows.stop
                handles.append(module.register_forward_hook(_hook(attachment, site.name, rows, first=index == site.first)))
        yield attachment
    finally:
        for handle in handles:
            handle.remove()


def _hook(attachment: Attachment, name: str, rows: slice, first: bool):
    def hook(module, args, output):
        x = args[0]
        if first and attachment.record is not None:
            attachment.record(name, x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x)
        delta = attachment.delta(name, x, rows, first)
        return output if delta is None else output + delta.to(output)

    return hook


def flat(x: Tensor) -> Tensor:
    """Layer input [..., d] -> [tokens, d]."""
    return x.reshape(-1, x.shape[-1])
