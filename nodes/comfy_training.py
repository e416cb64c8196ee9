"""Makes ComfyUI's models differentiable for a while, whatever their architecture, and leaves them as they were.

Four things stand in the way of a backward pass:
- the executor runs under `torch.inference_mode()`, so weights are inference tensors, which no backward may save;
- several families add in place to tensors that a norm has saved for its backward;
- rotary embeddings go through compiled kernels without a backward (ComfyUI 0.4 and later; those that know
  `model_management.in_training` have another way, switched by it);
- some attention kernels have no backward (SageAttention, ComfyUI's own wrapping of FlashAttention): nothing would be learnt before
  them, in silence.  And ComfyUI's order of torch's kernels goes before that of a caller who needs a second derivative.
"""

from __future__ import annotations

import sys

import comfy.ldm.modules.attention as attention
import comfy.model_management as management
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# of ComfyUI's attention functions those through which gradients pass
DIFFERENTIABLE = ("attention_basic", "attention_split", "attention_sub_quad", "attention_xformers", "attention_pytorch")


class Trainable:
    """A ComfyUI model, ready for a backward pass between `prepare` and `restore`; `close` when done with it."""

    def __init__(self, base: nn.Module, network: nn.Module):
        """network: the part of it that gradients go through"""
        self.base, self.ready = base, False
        self._swapped: list[tuple[dict, str, Tensor]] = []
        self._functions: list[tuple[object, str, object]] = []
        norms = (nn.LayerNorm, nn.RMSNorm)
        self._hooks = [
            module.register_forward_pre_hook(lambda m, a: (a[0].clone(), *a[1:]))
            for module in network.modules()
            if isinstance(module, norms)
        ]

    def prepare(self) -> None:
        """Ordinary tensors in the place of inference tensors; attention and rotary embeddings in plain torch."""
        self.ready = True
        self._functions = _plain_attention()
        if hasattr(management, "in_training"):
            management.in_training = True
        else:
            self._functions += _plain_rotary_embeddings()
        for module in self.base.modules():
            for kind in (module._parameters, module._buffers):
                for key, value in kind.items():
                    if value is None or not (value.is_inference() or value.requires_grad):
                        continue
                    self._swapped.append((kind, key, value))
                    same = _ordinary(value)
                    kind[key] = nn.Parameter(same, requires_grad=False) if kind is module._parameters else same

    def restore(self) -> None:
        """What were left in place would break later LoRA loads on quantised models."""
        self.ready = False
        for kind, key, value in self._swapped:
            kind[key] = value
        for module, name, function in self._functions:
            setattr(module, name, function)
        self._swapped, self._functions = [], []
        if hasattr(management, "in_training"):
            management.in_training = False

    def close(self) -> None:
        self.restore()
        for hook in self._hooks:
            hook.remove()


def _ordinary(value: Tensor) -> Tensor:
    """The same numbers in the same memory as a tensor that a backward pass may save; a clone of what has no plain memory"""
    value = value.detach()
    if type(value) is not Tensor or value.ndim == 0 or not value.is_contiguous():
        return value.clone()
    return torch.from_dlpack(value.view(torch.uint8)).view(value.dtype)


def _plain_attention() -> list[tuple[object, str, object]]:
    """Puts torch's attention in the place of kernels without a backward, and torch's choice of kernels in that of ComfyUI's;
    (module, name, original) of each."""
    replaced = [(comfy.ops, "scaled_dot_product_attention", comfy.ops.scaled_dot_product_attention)]
    comfy.ops.scaled_dot_product_attention = F.scaled_dot_product_attention
    for module in [m for name, m in sys.modules.items() if name.startswith("comfy.")]:
        for name in ("optimized_attention", "optimized_attention_masked"):
            function = getattr(module, name, None)
            if function is not None and getattr(function, "__name__", "") not in DIFFERENTIABLE:
                replaced.append((module, name, function))
                setattr(module, name, attention.attention_pytorch)
    return replaced


def _plain_rotary_embeddings() -> list[tuple[object, str, object]]:
    """Puts plain torch in the place of ComfyUI's compiled rotary embeddings; (module, name, original) of each."""
    import comfy.ldm.flux.math as flux

    if flux.apply_rope.__module__ == flux.__name__:  # ComfyUI's own, which is plain torch
        return []
    originals = {"apply_rope": flux.apply_rope, "apply_rope1": flux.apply_rope1}
    plain = {"apply_rope": lambda q, k, angles: (_rotate(q, angles), _rotate(k, angles)), "apply_rope1": _rotate}
    replaced = []
    for module in [m for name, m in sys.modules.items() if name.startswith("comfy.ldm.")]:
        for name, original in originals.items():
            if getattr(module, name, None) is original:
                replaced.append((module, name, original))
                setattr(module, name, plain[name])
    return replaced


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [..., tokens, width]; angles [..., tokens, width / 2, 2, 2]: a rotation of each pair of columns"""
    pairs = x.to(angles.dtype).reshape(*x.shape[:-1], -1, 1, 2)
    return (angles[..., 0] * pairs[..., 0] + angles[..., 1] * pairs[..., 1]).reshape(x.shape).to(x.dtype)
