"""Names of layers of SD3, SD3.5 and Flux.1: ComfyUI's, which fuse what reads one input, and diffusers', which keep it apart.

As in ComfyUI's comfy/utils.py (`mmdit_to_diffusers`, `flux_to_diffusers`); Chroma and HunyuanVideo are named as Flux.1 is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from torch import Tensor

SD3, FLUX = "sd3", "flux"
_QKV, _ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
MLP_RATIO = 4  # rows of a single block's proj_mlp over the layer's width
# ComfyUI's blocks: family, diffusers' name of them, and ComfyUI's layers with the modules that their rows are, from the first on
_BLOCKS = {
    "joint_blocks": (SD3, "transformer_blocks", {
        "x_block.attn.qkv": _QKV, "x_block.attn.proj": ("attn.to_out.0",),
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "x_block.attn2.proj": ("attn2.to_out.0",),
        "context_block.attn.qkv": _ADDED, "context_block.attn.proj": ("attn.to_add_out",),
        "x_block.mlp.fc1": ("ff.net.0.proj",), "x_block.mlp.fc2": ("ff.net.2",),
        "context_block.mlp.fc1": ("ff_context.net.0.proj",), "context_block.mlp.fc2": ("ff_context.net.2",),
        "x_block.adaLN_modulation.1": ("norm1.linear",), "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    }),
    "double_blocks": (FLUX, "transformer_blocks", {
        "img_attn.qkv": _QKV, "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.qkv": _ADDED, "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",), "txt_mlp.2": ("ff_context.net.2",),
        "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
    }),
    "single_blocks": (FLUX, "single_transformer_blocks", {
        "linear1": (*_QKV, "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",),
    }),
}  # fmt: skip
# of each family ComfyUI's layers outside the blocks, and diffusers'
_OUTER = {
    SD3: {
        "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1", "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    FLUX: {
        "img_in": "x_embedder", "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1", "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1", "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
}  # fmt: skip
_NUMBERED = re.compile(r"([a-z_]+?_blocks)[._](\d+)[._](.+)")
# beginnings of one layer's name that say who wrote the file: diffusers, OneTrainer, SimpleTuner, PEFT, kohya, ComfyUI
PREFIX = re.compile(r"^(base_model\.model\.)?(diffusion_model\.|lora_unet_|transformer\.|lora_transformer_|lycoris_)?")


@lru_cache(1 << 16)
def _numbered(name: str) -> re.Match | None:
    """A name of a block's layer, of any trainer: the block, its number and the rest"""
    return _NUMBERED.fullmatch(PREFIX.sub("", name))


@lru_cache(1 << 16)
def place(name: str, family: str | None) -> tuple[str, int, tuple[str, ...]] | None:
    """ComfyUI's name of the layer that a name of any trainer's means, which of its parts that is, and diffusers' names of all
    its parts; None of a layer that is none of these models'.

    family: SD3 or FLUX, which diffusers' names do not say; without it only ComfyUI's and kohya's of blocks are known.
    """
    numbered = _numbered(name)
    if numbered is None:
        bare = PREFIX.sub("", name)
        for ours, theirs in _OUTER.get(family, {}).items():
            if bare.replace(".", "_") in (ours.replace(".", "_"), theirs.replace(".", "_")):
                return f"diffusion_model.{ours}", -1 if bare.replace(".", "_") == ours.replace(".", "_") else 0, (theirs,)
        return None
    block, index, rest = numbered.groups()
    for ours, (kind, theirs, layers) in _BLOCKS.items():
        for layer, modules in layers.items() if block == ours or (block, family) == (theirs, kind) else ():
            found = [m.replace(".", "_") for m in ((layer,) if block == ours else modules)]
            if rest.replace(".", "_") in found:
                part = -1 if block == ours else found.index(rest.replace(".", "_"))
                return f"diffusion_model.{ours}.{index}.{layer}", part, modules
    return None


def turned(module: str, up: Tensor, width: int) -> Tensor:
    """lora_up of a module of diffusers as the layer of ComfyUI's has it, and back: of scale and shift alone, as of the last norm
    and of SD3's last block of text, each library has an order of its own"""
    both = module.endswith(("norm1_context.linear", "norm_out.linear")) and len(up) == 2 * width
    return up.roll(width, 0) if both else up


def parts(name: str, family: str | None) -> list[str]:
    """diffusers' names of the modules that a layer of ComfyUI's name is made of; none of a layer that is none of these models'"""
    found = place(name, family)
    if found is None:
        return []
    numbered = _numbered(found[0])
    block = f"{_BLOCKS[numbered[1]][1]}.{numbered[2]}." if numbered else ""
    return [f"transformer.{block}{module}" for module in found[2]]


def family_of(names: Iterable[str]) -> str | None:
    """The family that ComfyUI's and kohya's names of layers are of; None if they do not say, or contradict one another"""
    blocks = {m[1] for m in map(_numbered, names) if m}
    families = {_BLOCKS[b][0] for b in blocks if b in _BLOCKS}
    return families.pop() if len(families) == 1 else None


def guessed_family(widths: dict[str, int]) -> str | None:
    """The family that a file of diffusers' names is of; widths: inputs of each layer.

    Flux.1 alone has single blocks of these modules.  SD3 is as many blocks deep as its width holds heads of 64, and no size
    of it is 3072 wide, as others are whose blocks have the same names (Flux.1's double ones, Qwen-Image's).
    """
    found = {n: m for n in widths if (m := _numbered(n)) and m[1].endswith("transformer_blocks")}
    blocks = {m[1] for m in found.values()}
    family = FLUX if "single_transformer_blocks" in blocks else SD3
    if not found or not all(place(n, family) for n in found):
        return None
    first = [widths[n] for n in found if re.search(r"attn2?[._](to|add)_", n)]
    if family == SD3 and not (first and first[0] != 3072 and max(int(m[2]) for m in found.values()) < first[0] // 64):
        return None
    return family
