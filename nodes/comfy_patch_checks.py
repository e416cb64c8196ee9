"""Whether what ComfyUI has read of a LoRA file is whole and fits a weight, told before anything is patched; and what it rests on."""

from __future__ import annotations

import logging
import math

import comfy.lora
import torch
from comfy.weight_adapter import BOFTAdapter, GLoRAAdapter, LoHaAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter
from comfy.weight_adapter.base import WeightAdapterBase

from ..seqlora_core.adapter import LARGEST_SCALE
from ..seqlora_core.errors import UserError

DAMAGED = (KeyError, IndexError, RuntimeError, ValueError, AttributeError, TypeError)  # what a broken file may raise
MAGNITUDE = {LoRAAdapter: 4, LoHaAdapter: 7, LoKrAdapter: 8}  # where each keeps a DoRA's magnitudes, if it is one


def rows_shape(shape: tuple[int, ...], rows) -> tuple[int, ...]:
    return tuple(rows[2] if rows and i == rows[0] else n for i, n in enumerate(shape))


def check_patch(patch, shape: tuple[int, ...], source: str) -> None:
    """UserError for a patch that is not whole or was made for a weight of another shape"""
    try:
        found, whole = _shape_of(patch, shape), _is_whole(patch, shape)
    except DAMAGED as error:
        raise UserError(f"{source} is incomplete or damaged ({error}); get it again") from error
    if found is not None:
        check_size(found, shape, source)
    if not whole:
        raise UserError(f"{source} has parts that do not fit one another; the file is damaged, get it again")


def _is_whole(patch, shape: tuple[int, ...]) -> bool:
    """Whether a patch's alpha is one that training sets, and its magnitudes are as many as the weight has rows or columns"""
    rank, alpha = None, None
    if isinstance(patch, LoHaAdapter):
        rank, alpha = patch.weights[1].shape[0], patch.weights[2]
    elif isinstance(patch, LoKrAdapter):  # of two whole factors no alpha counts, and ai-toolkit writes an endless one
        parts, alpha = [p for p in (patch.weights[4], patch.weights[6]) if p is not None], patch.weights[2]
        rank = parts[0].shape[0] if parts else None
    elif isinstance(patch, GLoRAAdapter):
        rank, alpha = min(patch.weights[0].shape), patch.weights[4]
    if rank is not None and alpha is not None and not abs(alpha) <= LARGEST_SCALE * rank:
        return False
    magnitude = patch.weights[MAGNITUDE[type(patch)]] if type(patch) in MAGNITUDE else None
    return magnitude is None or magnitude.numel() in (shape[0], math.prod(shape[1:]), shape[1])


def reads_weight(patch) -> bool:
    """Whether what a patch changes depends on the weight, as a DoRA's, an OFT's or a whole new weight's does"""
    if type(patch) in MAGNITUDE:
        return patch.weights[MAGNITUDE[type(patch)]] is not None
    return not (isinstance(patch, tuple) and patch[0] == "diff")


class _Errors(logging.Handler):
    """What ComfyUI logs instead of raising it"""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def failure(patch, shape: tuple[int, ...]) -> str:
    """Why ComfyUI cannot change a weight of this shape by a patch, or nothing; tried on noise, once for parts of these shapes"""
    if not isinstance(patch, WeightAdapterBase):
        return ""
    sizes = tuple(tuple(w.shape) if isinstance(w, torch.Tensor) else w is None for w in patch.weights)
    key = type(patch), sizes, shape
    if key not in _failures:
        _failures[key] = _tried(patch, shape)
    return _failures[key]


_failures: dict[tuple, str] = {}


def _tried(patch, shape: tuple[int, ...]) -> str:
    errors, weight = _Errors(), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    logging.getLogger().addHandler(errors)
    try:
        comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight, "")
    except DAMAGED as error:
        return str(error)
    finally:
        logging.getLogger().removeHandler(errors)
    return errors.said[0] if errors.said else ""


def check_size(found: tuple[int, int], shape: tuple[int, ...], source: str) -> None:
    """UserError if a change of so many rows and columns is none of a weight of this shape"""
    if found != (shape[0], math.prod(shape[1:])):
        raise UserError(
            f"{source} is for a weight of {list(found)}, this model's is {list(shape)}: the file was trained on another kind "
            "of model, load that one"
        )


def _shape_of(patch, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of the weight that a patch was made for; None if it does not say"""
    if isinstance(patch, LoRAAdapter):
        up, down, _, mid, _, reshape = patch.weights[:6]
        if reshape is not None:
            return None
        if mid is not None:
            return up.shape[0], down.shape[1] * mid.shape[2:].numel()
        return up.shape[0], down.shape[1:].numel()
    if isinstance(patch, LoHaAdapter):
        a, b, _, _, _, core = patch.weights[:6]
        return (a.shape[0], b.shape[1:].numel()) if core is None else (a.shape[1], b.shape[1] * core.shape[2:].numel())
    if isinstance(patch, LoKrAdapter):
        w1, w2, _, w1_a, w1_b, w2_a, w2_b, core = patch.weights[:8]
        first = tuple(w1.shape) if w1 is not None else (w1_a.shape[0], w1_b.shape[1])
        if w2 is not None:
            second = (w2.shape[0], w2.shape[1:].numel())
        elif core is None:
            second = (w2_a.shape[0], w2_b.shape[1:].numel())
        else:
            second = (w2_a.shape[1], w2_b.shape[1] * core.shape[2:].numel())
        return first[0] * second[0], first[1] * second[1]
    if isinstance(patch, (OFTAdapter, BOFTAdapter)):
        blocks = patch.weights[0]
        return blocks.shape[-3] * blocks.shape[-1], int(torch.Size(shape[1:]).numel())
    if isinstance(patch, tuple) and isinstance(patch[-1], tuple):
        change = patch[-1][0]
        return (change.shape[0], change.shape[1:].numel()) if change.ndim else (1, 1)
    return None
