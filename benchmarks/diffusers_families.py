"""Diffusers' image transformers at their smallest: the real classes, with random weights, and how each is called.

Widths and depths are cut, nothing else.  `call` gives the model what its own pipeline does: packed or plain latents, positions,
masks, guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seqlora_core.denoiser import Conditioning

TOKENS, WIDTH = 7, 32


@dataclass
class Family:
    """name: as in comfy_families.  model, pipeline: classes of diffusers; settings: the model's.  call: (model, latents [n, c, 8, 8],
    time in 0..1 [n], prompts) -> prediction of the latents' shape.  pipeline "": diffusers has no LoRA loader for it.
    """

    name: str
    model: str
    settings: dict
    call: Callable[[torch.nn.Module, Tensor, Tensor, Conditioning], Tensor]
    pipeline: str = ""
    latent: tuple[int, ...] = (16, 8, 8)


def pack(x: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, h/2 w/2, 4 c], as Flux does"""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(x: Tensor, like: Tensor) -> Tensor:
    n, c, h, w = like.shape
    return x.view(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def positions(h: int, w: int, axes: int = 3) -> Tensor:
    """[h w, axes]: rows and columns in the second and third"""
    ids = torch.zeros(h, w, axes)
    ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)[None]
    return ids.view(h * w, axes)


def ones(c: Conditioning, kind=torch.bool) -> Tensor:
    return torch.ones(c.context.shape[:2], dtype=kind)


def sd3(model, x, t, c):
    return model(x, c.context, c.pooled, 1000 * t, return_dict=False)[0]


def flux(model, x, t, c):
    guidance = torch.full_like(t, 3.5) if model.config.guidance_embeds else None
    ids, text = positions(x.shape[2] // 2, x.shape[3] // 2), torch.zeros(TOKENS, 3)
    out = model(pack(x), c.context, c.pooled, t, ids, text, guidance, return_dict=False)[0]
    return unpack(out, x)


def chroma(model, x, t, c):
    ids, text = positions(x.shape[2] // 2, x.shape[3] // 2), torch.zeros(TOKENS, 3)
    mask = torch.ones(len(x), TOKENS + len(ids), dtype=torch.bool)
    return unpack(model(pack(x), c.context, t, ids, text, mask, return_dict=False)[0], x)


def flux2(model, x, t, c):
    n, channels, h, w = x.shape
    ids, text = positions(h, w, 4).expand(n, -1, -1), torch.zeros(n, TOKENS, 4)
    out = model(x.flatten(2).mT, c.context, t, ids, text, torch.full_like(t, 3.5), return_dict=False)[0]
    return out.mT.reshape(n, channels, h, w)


def lumina(model, x, t, c):
    return model(x, 1 - t, c.context, ones(c), return_dict=False)[0]


def z_image(model, x, t, c):
    return torch.stack(model(list(x[:, :, None]), 1 - t, list(c.context), return_dict=False)[0])[:, :, 0]


def qwen(model, x, t, c):
    shapes = [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x)
    return unpack(model(pack(x), c.context, ones(c), t, shapes, return_dict=False)[0], x)


def plain(model, x, t, c):
    return model(x, c.context, t, return_dict=False)[0]


def sana(model, x, t, c):
    return model(x, c.context, 1000 * t, encoder_attention_mask=ones(c), return_dict=False)[0]


def pixart(model, x, t, c):
    more = {"resolution": None, "aspect_ratio": None}
    out = model(x, c.context, 1000 * t, more, encoder_attention_mask=ones(c), return_dict=False)[0]
    return out.chunk(2, 1)[0]


def cogview(model, x, t, c):
    size = torch.tensor([[64.0, 64.0]]).expand(len(x), -1)
    return model(x, c.context, 1000 * t, size, size, torch.zeros_like(size), return_dict=False)[0]


def hunyuan(model, x, t, c):
    return model(x, 1000 * t, c.context, ones(c), return_dict=False)[0]


HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
SD3 = HEADS | {
    "sample_size": 8, "num_layers": 2, "joint_attention_dim": WIDTH, "caption_projection_dim": 32, "pooled_projection_dim": WIDTH,
    "pos_embed_max_size": 8,
}  # fmt: skip
FLUX = HEADS | {
    "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
ROPE = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": WIDTH}
FAMILIES = [
    Family("SD3", "SD3Transformer2DModel", SD3, sd3, "StableDiffusion3Pipeline"),
    Family(
        "SD3.5", "SD3Transformer2DModel", SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}, sd3,
        "StableDiffusion3Pipeline",
    ),
    Family(
        "Flux.1", "FluxTransformer2DModel", FLUX | {"pooled_projection_dim": WIDTH, "guidance_embeds": True}, flux, "FluxPipeline"
    ),
    Family("Flux.1 schnell", "FluxTransformer2DModel", FLUX | {"pooled_projection_dim": WIDTH}, flux, "FluxPipeline"),
    Family(
        "Chroma", "ChromaTransformer2DModel",
        FLUX | {"approximator_num_channels": 8, "approximator_hidden_dim": 32, "approximator_layers": 1}, chroma, "ChromaPipeline",
    ),
    Family(
        "Flux.2", "Flux2Transformer2DModel",
        HEADS | {
            "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 4, 4, 4),
            "timestep_guidance_channels": 16,
        },
        flux2, "Flux2Pipeline",
    ),
    Family("AuraFlow", "AuraFlowTransformer2DModel", HEADS | {
        "sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": WIDTH,
        "caption_projection_dim": 32, "out_channels": 4, "pos_embed_max_size": 16,
    }, plain, "AuraFlowPipeline", (4, 8, 8)),
    Family("Lumina 2", "Lumina2Transformer2DModel", {
        "sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
        "multiple_of": 16, "axes_dim_rope": (4, 6, 6), "axes_lens": (32, 32, 32), "cap_feat_dim": WIDTH,
    }, lumina, "Lumina2Pipeline"),
    Family("Z-Image", "ZImageTransformer2DModel", ROPE | {"axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32]}, z_image, "ZImagePipeline"),
    Family("Qwen-Image", "QwenImageTransformer2DModel", HEADS | {
        "in_channels": 64, "out_channels": 16, "num_layers": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
    }, qwen, "QwenImagePipeline"),
    Family("Sana", "SanaTransformer2DModel", {
        "in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": WIDTH, "sample_size": 8,
    }, sana, "SanaPipeline"),
    Family("CogView 4", "CogView4Transformer2DModel", HEADS | {
        "num_layers": 2, "text_embed_dim": WIDTH, "time_embed_dim": 16, "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8,
        "rope_axes_dim": (8, 8),
    }, cogview, "CogView4Pipeline"),
    Family("PixArt sigma", "PixArtTransformer2DModel", HEADS | {
        "in_channels": 4, "out_channels": 8, "num_layers": 2, "cross_attention_dim": 32, "sample_size": 8, "caption_channels": WIDTH,
        "use_additional_conditions": False,
    }, pixart, "", (4, 8, 8)),
    Family("HunyuanImage 2.1", "HunyuanImageTransformer2DModel", HEADS | {
        "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": WIDTH,
        "rope_axes_dim": (8, 8),
    }, hunyuan),
]  # fmt: skip


def build(family: Family) -> torch.nn.Module:
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, family.model)(**family.settings).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # modulation that is small, or starts at zero, shuts attention out: then nothing depends on it
        if not parameter.any() or "norm" in name and parameter.ndim == 2:
            parameter.normal_(std=0.5)
    return model
