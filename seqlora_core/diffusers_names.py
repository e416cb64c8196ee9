"""A LoRA of SD3, SD3.5 or Flux.1 under diffusers' names: its loaders know no layer that fuses what they keep apart.

The layers and their rows as in `transformer_sites`; diffusers reads files of U-Nets as they are.
"""

from __future__ import annotations

import re

from torch import Tensor

from .adapter import Adapter, LayerDelta
from .errors import UserError

_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
# ComfyUI's name of a layer -> diffusers' block, and the modules that its rows are, from the first on
_LAYERS = (
    (r"joint_blocks\.(\d+)\.x_block\.(attn2?)\.qkv", r"transformer_blocks.\1.\2", _QKV),
    (r"joint_blocks\.(\d+)\.x_block\.(attn2?)\.proj", r"transformer_blocks.\1.\2", ("to_out.0",)),
    (r"joint_blocks\.(\d+)\.context_block\.attn\.qkv", r"transformer_blocks.\1.attn", _ADDED),
    (r"joint_blocks\.(\d+)\.context_block\.attn\.proj", r"transformer_blocks.\1.attn", ("to_add_out",)),
    (r"double_blocks\.(\d+)\.img_attn\.qkv", r"transformer_blocks.\1.attn", _QKV),
    (r"double_blocks\.(\d+)\.img_attn\.proj", r"transformer_blocks.\1.attn", ("to_out.0",)),
    (r"double_blocks\.(\d+)\.txt_attn\.qkv", r"transformer_blocks.\1.attn", _ADDED),
    (r"double_blocks\.(\d+)\.txt_attn\.proj", r"transformer_blocks.\1.attn", ("to_add_out",)),
    (r"single_blocks\.(\d+)\.linear1", r"single_transformer_blocks.\1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    (r"single_blocks\.(\d+)\.linear2", r"single_transformer_blocks.\1", ("proj_out",)),
)


def as_diffusers(adapter: Adapter) -> dict[str, Tensor]:
    """Tensors of a file that `load_lora_weights` of StableDiffusion3Pipeline and FluxPipeline reads.

    UserError for a layer that is none of these models' attention.
    """
    tensors: dict[str, Tensor] = {}
    for name, delta in adapter.layers.items():
        plain = name.removeprefix("diffusion_model.")
        found = next(((m, *rest) for pattern, *rest in _LAYERS if (m := re.fullmatch(pattern, plain))), None)
        if found is None:
            raise UserError(
                f"{name} is no attention layer of SD3 or Flux.1: diffusers reads other models' files as they are, "
                "and token tables not at all (leave them out with --layers=-token_embedding)"
            )
        match, block, modules = found
        for module, up in zip(modules, _rows(delta, len(modules))):
            stem = f"transformer.{match.expand(block)}.{module}"
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = delta.down.clone(), up.clone()
    return tensors


def _rows(delta: LayerDelta, modules: int) -> list[Tensor]:
    """lora_up of each module; q, k and v have as many rows as the layer has inputs, what comes after them the rest"""
    width = delta.down.shape[1]
    sizes = [len(delta.up)] if modules == 1 else [width] * 3 + [len(delta.up) - 3 * width] * (modules - 3)
    return list(delta.up.split(sizes))
