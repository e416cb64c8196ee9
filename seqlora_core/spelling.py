"""How trainers spell a LoRA's tensors: which two belong together, and one name for a layer that has many.

Suffixes as in ComfyUI's comfy/weight_adapter/lora.py; block numbers of Stability's U-Nets as in diffusers'
loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from .errors import UserError
from .transformer_names import PREFIX

PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),  # kohya, musubi, OneTrainer, LyCORIS
    (".lora_A.weight", ".lora_B.weight"),  # PEFT, diffusers, ai-toolkit
    (".lora_A.default.weight", ".lora_B.default.weight"),
    ("_lora.down.weight", "_lora.up.weight"),  # diffusers before PEFT
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_A", ".lora_B"),
)
_ENDINGS = tuple(ending for pair in PAIRS for ending in pair)
# part of a key -> what kind of file it gives away
_OTHER_KINDS = {
    "hada_w": "a LoHa", "lokr_w": "a LoKr", "oft_blocks": "an OFT or BOFT", "boft_R": "a BOFT of peft", "oft_R": "an OFT of peft", "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA", r"\.a1\.weight$": "a GLoRA", r"\.diff(_b)?$": "a full-difference file", r"\.set_weight$": "a file of whole weights", "w_norm": "a file of norms",
}  # fmt: skip


@dataclass
class Factors:
    """One layer as it stands in a file.  down [r, in, ...], up [out, r, ...]; mid [r, r, h, w] of a Tucker LoCon."""

    down: Tensor
    up: Tensor
    mid: Tensor | None
    alpha: float | None


def factors(tensors: dict[str, Tensor], source: str) -> dict[str, Factors]:
    """Stem -> factors of every plain low-rank layer.  source: the file's name, for messages."""
    found, half = {}, {}
    for key, tensor in tensors.items():
        if key.endswith(_ENDINGS):
            pair, side = next((p, i) for p in PAIRS for i in (0, 1) if key.endswith(p[i]))
            half.setdefault((key.removesuffix(pair[side]), pair), {})[side] = tensor
    for (stem, pair), sides in half.items():
        if len(sides) < 2:
            here, absent = pair if 0 in sides else pair[::-1]
            raise UserError(
                f"{source}: {stem} has {here.strip('._')} but no {absent.strip('._')}; the file is incomplete, get it again"
            )
        if any(side.ndim == 0 for side in sides.values()):
            raise UserError(f"{source}: {stem} is of rank 0 or of no size, []: the file is damaged, get it again")
        alpha = tensors.get(f"{stem}.alpha")
        alpha = None if alpha is None else alpha_of(alpha, f"{source}: {stem}")
        found[stem] = Factors(sides[0], sides[1], tensors.get(f"{stem}.lora_mid.weight"), alpha)
    return found


def alpha_of(alpha: Tensor, source: str) -> float:
    """The number; UserError if it is not one.  source: for the message"""
    if alpha.numel() != 1 or alpha.is_complex():
        raise UserError(f"{source} has an alpha of shape {list(alpha.shape)}, not one number; get the file again")
    return float(alpha)


def other_kind(tensors: dict[str, Tensor]) -> str | None:
    """What a file is, in words, if some of it is not plain low-rank"""
    keys = "\n".join(tensors)
    return next((kind for part, kind in _OTHER_KINDS.items() if re.search(part, keys, re.MULTILINE)), None)


_BEGINNINGS = r"(unet|text_encoder(_\d)?|transformer|diffusion_model)\."


def canonical(stem: str, two_encoders: bool = False) -> str:
    """The one name of a layer: kohya's spelling of diffusers' modules for U-Nets and CLIP, else the file's own.

    `unet.down_blocks.0.attentions.0.proj_in`, `down_blocks.0.attentions.0.proj_in`, `lora_unet_input_blocks_1_1_proj_in` and
    `diffusion_model.input_blocks.1.1.proj_in` are all `lora_unet_down_blocks_0_attentions_0_proj_in`.
    """
    name = stem.replace("base_model.model.", "").replace(".processor.", ".")
    name = re.sub(r"\.to_out$", ".to_out.0", name)
    if re.match(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding)\b", name):
        name = f"unet.{name}"
    elif name.startswith("text_model."):
        name = f"text_encoder.{name}"
    elif re.match(r"(single_|joint_)?transformer_blocks\.", name):
        name = f"transformer.{name}"
    elif re.match(r"(joint|double|single)_blocks\.", name):
        name = f"diffusion_model.{name}"
    elif stem.startswith("base_model.model.") and not re.match(_BEGINNINGS, name):
        name = stem  # of a model that is not known here: what reads the file may need the prefix
    first_encoder = "lora_te1_" if two_encoders else "lora_te_"
    for prefix, short in (("unet.", "lora_unet_"), ("text_encoder.", first_encoder), ("text_encoder_2.", "lora_te2_")):
        if name.startswith(prefix):
            name = short + name.removeprefix(prefix).replace(".", "_")
    stability = re.fullmatch(r"(?:lora_unet_|diffusion_model\.)((?:input_blocks|output_blocks|middle_block)[._].+)", name)
    return f"lora_unet_{_diffusers_block(stability[1].replace('.', '_'))}" if stability else name


_RESNET = {
    "in_layers_0": "norm1", "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_0": "norm2",
    "out_layers_3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip


def _diffusers_block(name: str) -> str:
    """`input_blocks_4_1_proj_in` -> `down_blocks_1_attentions_0_proj_in`; two layers a block, as in SD1.5, SD2 and SDXL"""
    middle = re.fullmatch(r"middle_block_([012])_(.+)", name)
    if middle:
        part, rest = int(middle[1]), middle[2]
        return f"mid_block_attentions_0_{rest}" if part == 1 else f"mid_block_resnets_{part // 2}_{_RESNET.get(rest, rest)}"
    outer = re.fullmatch(r"(input|output)_blocks_([0-9]{1,3})_([0-9]{1,3})_(.+)", name)
    if not outer:
        return name
    side, index, part, rest = outer.groups()
    if side == "input":
        if index == "0":
            return "conv_in"
        block, layer, stem = (int(index) - 1) // 3, (int(index) - 1) % 3, "down_blocks"
        if layer == 2:
            return f"{stem}_{block}_downsamplers_0_conv"
    else:
        block, layer, stem = int(index) // 3, int(index) % 3, "up_blocks"
        if rest == "conv":
            return f"{stem}_{block}_upsamplers_0_conv"
    if part == "0":
        return f"{stem}_{block}_resnets_{layer}_{_RESNET.get(rest, rest)}"
    return f"{stem}_{block}_attentions_{layer}_{rest}"


@lru_cache(1 << 16)
def plain(name: str) -> str:
    """A name without its trainer's prefix and punctuation: `diffusion_model.a.b` and `lora_unet_a_b` are both `a_b`; the first
    of several text encoders is the only one of others, and CLIP's two have their numbers"""
    name = re.sub(r"^(lora_te1_|text_encoders\.clip_l\.transformer\.)", "lora_te_", name)
    name = re.sub(r"^text_encoders\.clip_g\.transformer\.", "lora_te2_", name)
    return PREFIX.sub("", name).replace(".", "_")
