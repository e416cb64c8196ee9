"""Gradient checkpointing: the blocks of a network keep their inputs only, and are run again in the backward pass."""

from __future__ import annotations

import contextlib

from torch import nn
from torch.utils.checkpoint import checkpoint

from .attach import Site


def blocks_of(network: nn.Module, sites: list[Site]) -> list[nn.Module]:
    """The innermost repeated blocks that hold adapted layers: members of the network's module lists, whatever its family"""
    adapted = {module for site in sites for module in site.modules}
    blocks = []
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            blocks += [m for m in module if m not in adapted and adapted & set(m.modules())]
    return [b for b in blocks if not any(b is not other and other in set(b.modules()) for other in blocks)]


@contextlib.contextmanager
def recomputed(network: nn.Module, sites: list[Site]):
    """For the length of a `with` block"""
    blocks = blocks_of(network, sites)
    try:
        for block in blocks:
            block.forward = _checkpointed(block.forward)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _checkpointed(forward):
    import torch

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
