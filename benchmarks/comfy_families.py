"""ComfyUI's image models at their smallest: the real classes, with random weights, and what their text encoders give.

Imported inside ComfyUI's python only.  Widths and depths are cut, nothing else: see comfy/model_detection.py for how
ComfyUI itself fills in these settings from a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import comfy.model_patcher
import comfy.supported_models
import torch
from seqlora_pack.nodes.comfy_denoiser import ComfyDenoiser, _conditioning
from seqlora_pack.seqlora_core.denoiser import Conditioning
from torch import Tensor

SIZE = (64, 64)
PROMPTS = ["a first prompt", "a second prompt"]


@dataclass
class Family:
    """model: class in comfy.supported_models.  settings: its unet_config; later: what ComfyUI 0.4 and later add to it.
    latent: of one picture.  tokens: of two prompts; width: of a token.  more: shapes of what else the text encoder
    gives, () for one number a token."""

    name: str
    model: str
    settings: dict
    latent: tuple[int, ...] = (16, 8, 8)
    tokens: tuple[int, int] = (7, 7)
    width: int = 32
    pooled: int = 0
    more: dict[str, tuple[int, ...]] = field(default_factory=dict)
    later: dict = field(default_factory=dict)


UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 1], "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1, "use_linear_in_transformer": False, "context_dim": 32, "adm_in_channels": None,
    "use_temporal_attention": False, "use_temporal_resblock": False, "use_spatial_transformer": True, "legacy": False,
    "use_checkpoint": False,
}  # fmt: skip
WIDER = UNET | {"model_channels": 64}  # one head of 64
XL = WIDER | {"use_linear_in_transformer": True, "num_classes": "sequential"}
SDXL = XL | {"context_dim": 64, "adm_in_channels": 1280 + 1536}
FOUR = {
    "num_res_blocks": [1, 1, 1, 1], "channel_mult": [1, 1, 1, 1], "transformer_depth": [0, 1, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1, 1, 1], "transformer_depth_middle": 1,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 16, "context_in_dim": 32,
    "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6],
    "theta": 10000, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
CHROMA = {k: v for k, v in FLUX.items() if k not in ("guidance_embed", "vec_in_dim")} | {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 32, "hidden_dim": 32, "n_layers": 1,
}  # fmt: skip
CHROMA_LATER = {"txt_ids_dims": [], "vec_in_dim": None}
PIXART = {
    "num_heads": 2, "patch_size": 2, "hidden_size": 32, "in_channels": 4, "depth": 1, "input_size": 32,
    "pe_interpolation": 1, "caption_channels": 32, "model_max_length": 7,
}  # fmt: skip
HYDIT = {"image_model": "hydit", "depth": 2, "hidden_size": 64, "num_heads": 2, "text_states_dim": 32, "text_states_dim_t5": 32}
HYDIT_TEXT = {"attention_mask": (77,), "conditioning_mt5xl": (256, 32), "attention_mask_mt5xl": (256,)}
HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 768,
    "axes_dim": [4, 6, 6], "meanflow": False, "context_in_dim": 32, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2,
    "depth": 1, "depth_single_blocks": 1, "theta": 256, "qkv_bias": True, "byt5": False, "guidance_embed": True,
}  # fmt: skip
HUNYUAN_LATER = {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 32, "cap_feat_dim": 32, "n_layers": 1,
    "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 1, "qk_norm": True, "axes_dims": [4, 6, 6],
    "axes_lens": [300, 512, 512], "multiple_of": 32,
}  # fmt: skip
Z_IMAGE = LUMINA | {
    "dim": 256, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "rope_theta": 256.0, "ffn_dim_multiplier": 2.0, "z_image_modulation": True, "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}  # fmt: skip
COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True, "crossattn_emb_channels": 32,
    "pos_emb_cls": "rope3d", "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 16,
    "num_blocks": 1, "num_heads": 2, "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 1.0,
    "rope_w_extrapolation_ratio": 1.0, "rope_t_extrapolation_ratio": 1.0, "extra_h_extrapolation_ratio": 1.0,
    "extra_w_extrapolation_ratio": 1.0, "extra_t_extrapolation_ratio": 1.0,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "dim": 32, "out_dim": 16, "num_heads": 2, "ffn_dim": 32, "num_layers": 1, "patch_size": (1, 2, 2), "freq_dim": 16,
    "text_dim": 32, "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "model_type": "t2v",
}  # fmt: skip
PREDICT2 = COSMOS | {
    "image_model": "cosmos_predict2",
    "pos_emb_learnable": True,
    "min_fps": 1,
    "max_fps": 30,
    "rope_enable_fps_modulation": False,
}

ALPHA = {"image_model": "pixart_alpha", "micro_condition": True, "hidden_size": 48}  # whose width divides by 3

FAMILIES = [
    Family("SD1.5", "SD15", UNET, (4, 8, 8), (77, 154)),
    Family("SD2.1", "SD20", WIDER | {"use_linear_in_transformer": True}, (4, 8, 8), (77, 77)),
    Family("SDXL", "SDXL", SDXL, (4, 8, 8), (77, 154), 64, 1280),
    Family("SDXL refiner", "SDXLRefiner", XL | {"adm_in_channels": 1280 + 1280}, (4, 8, 8), (77, 77), 32, 1280),
    Family("SSD-1B", "SSD1B", SDXL, (4, 8, 8), (77, 77), 64, 1280),
    Family("Segmind Vega", "Segmind_Vega", SDXL, (4, 8, 8), (77, 77), 64, 1280),
    Family("KOALA 700M", "KOALA_700M", SDXL, (4, 8, 8), (77, 77), 64, 1280),
    Family("KOALA 1B", "KOALA_1B", SDXL, (4, 8, 8), (77, 77), 64, 1280),
    Family("SD1.5 inpainting", "SD15", UNET | {"in_channels": 9}, (4, 8, 8), (77, 77)),
    Family("SDXL inpainting", "SDXL", SDXL | {"in_channels": 9}, (4, 8, 8), (77, 77), 64, 1280),
    Family("Lotus D", "LotusD", WIDER | {"use_linear_in_transformer": True, "adm_in_channels": 4, "num_heads": 2, "num_classes": "sequential"}, (4, 8, 8), (77, 77)),
    Family("SD x4 upscaler", "SD_X4Upscaler", WIDER | FOUR | {"in_channels": 7, "use_linear_in_transformer": True}, (4, 16, 16), (77, 77)),
    Family(
        "Stable Cascade C", "Stable_Cascade_C",
        {"stable_cascade_stage": "c", "c_cond": 32, "c_hidden": [32, 32], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]],
         "c_clip_text": 32, "c_clip_text_pooled": 32, "c_clip_img": 768},
        (16, 8, 8), (77, 77), 32, 32,
    ),
    Family(
        "Stable Cascade B", "Stable_Cascade_B",
        {"stable_cascade_stage": "b", "c_cond": 32, "c_hidden": [32, 32, 32, 32], "nhead": [-1, -1, 2, 2],
         "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]], "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]], "c_clip": 32},
        (4, 16, 16), (77, 77), 32, 32,
    ),
    Family(
        "SD3", "SD3",
        {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 32,
         "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
         "num_patches": 256, "pos_embed_max_size": 16, "pos_embed_scaling_factor": None, "x_block_self_attn_layers": []},
        tokens=(77, 154), pooled=32,
    ),
    Family(
        "SD3.5", "SD3",
        {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 32,
         "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
         "num_patches": 256, "pos_embed_max_size": 16, "pos_embed_scaling_factor": None, "qk_norm": "rms",
         "x_block_self_attn_layers": [0]},
        tokens=(77, 154), pooled=32,
    ),
    Family("Flux.1", "Flux", FLUX, tokens=(8, 12), pooled=16, later={"txt_ids_dims": []}),
    Family("Flux.1 schnell", "FluxSchnell", FLUX | {"guidance_embed": False}, tokens=(8, 8), pooled=16, later={"txt_ids_dims": []}),
    Family("Flux.1 fill", "FluxInpaint", FLUX | {"in_channels": 96}, tokens=(8, 8), pooled=16, later={"txt_ids_dims": []}),
    Family("Chroma", "Chroma", CHROMA, tokens=(8, 12), later=CHROMA_LATER),
    Family(
        "Chroma Radiance", "ChromaRadiance",
        CHROMA | {"image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 8,
         "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 4, "nerf_tile_size": 32, "nerf_final_head_type": "conv",
         "nerf_embedder_dtype": torch.float32},
        (3, 64, 64), (8, 12), later=CHROMA_LATER | {"use_x0": False},
    ),
    Family("AuraFlow", "AuraFlow", {"cond_seq_dim": 32, "max_seq": 64, "n_double_layers": 1, "n_layers": 2, "dim": 64, "n_heads": 2, "global_conddim": 64}, (4, 8, 8)),
    Family("PixArt alpha", "PixArtAlpha", PIXART | ALPHA, (4, 64, 64)),
    Family("PixArt sigma", "PixArtSigma", PIXART | {"image_model": "pixart_sigma", "micro_condition": False}, (4, 64, 64)),
    Family("HunyuanDiT", "HunyuanDiT", HYDIT, (4, 8, 8), (77, 77), more=HYDIT_TEXT),
    Family("HunyuanDiT 1.0", "HunyuanDiT1", HYDIT | {"image_model": "hydit1", "size_cond": True, "use_style_cond": True}, (4, 8, 8), (77, 77), more=HYDIT_TEXT),
    Family("Lumina 2", "Lumina2", LUMINA, tokens=(7, 9), more={"attention_mask": ()}),
    Family("Z-Image", "ZImage", Z_IMAGE, tokens=(7, 9), more={"attention_mask": ()}),
    Family(
        "Z-Image pixel space", "ZImagePixelSpace",
        Z_IMAGE | {"image_model": "zimage_pixel", "patch_size": 8, "in_channels": 3, "decoder_hidden_size": 32, "decoder_num_res_blocks": 1,
         "decoder_max_freqs": 2, "decoder_in_channels": 192},
        (3, 32, 32), (7, 9), more={"attention_mask": ()},
    ),
    Family(
        "Flux.2", "Flux2",
        FLUX | {"image_model": "flux2", "in_channels": 64, "out_channels": 64, "patch_size": 1, "vec_in_dim": None, "axes_dim": [4, 4, 4, 4],
         "theta": 2000, "qkv_bias": False, "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
         "default_ref_method": "index", "ref_index_scale": 10.0},
        (64, 4, 4), (8, 8),
    ),
    Family("LongCat-Image", "LongCatImage", FLUX | {"guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]}, tokens=(8, 12)),
    Family(
        "Kandinsky 5 image", "Kandinsky5Image",
        {"image_model": "kandinsky5", "model_dim": 64, "ff_dim": 64, "visual_embed_dim": 64, "in_text_dim": 32, "in_text_dim2": 32,
         "time_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (16, 24, 24)},
        (16, 1, 8, 8), (7, 9), pooled=32,
    ),
    Family(
        "Anima", "Anima",
        COSMOS | {"image_model": "anima", "crossattn_emb_channels": 1024, "pos_emb_learnable": True, "min_fps": 1, "max_fps": 30,
         "rope_enable_fps_modulation": False},
        (16, 1, 8, 8), width=1024, more={"t5xxl_ids": (), "t5xxl_weights": ()},
    ),
    Family(
        "HiDream", "HiDream",
        {"image_model": "hidream", "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6], "caption_channels": [32, 32],
         "max_resolution": [128, 128], "in_channels": 16, "llama_layers": [0, 1, 2], "num_attention_heads": 2,
         "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 1, "num_single_layers": 1, "out_channels": 16,
         "patch_size": 2, "text_emb_dim": 32},
        tokens=(8, 8), pooled=32, more={"conditioning_llama3": (3, 8, 32)},
    ),
    Family(
        "OmniGen 2", "Omnigen2",
        {"image_model": "omnigen2", "axes_dim_rope": [4, 6, 6], "axes_lens": [1024, 1664, 1664], "ffn_dim_multiplier": None,
         "hidden_size": 32, "in_channels": 16, "multiple_of": 32, "norm_eps": 1e-5, "num_attention_heads": 2, "num_kv_heads": 1,
         "num_layers": 1, "num_refiner_layers": 1, "out_channels": None, "patch_size": 2, "text_feat_dim": 32, "timestep_scale": 1000.0},
        tokens=(7, 9), more={"attention_mask": ()},
    ),
    Family(
        "Qwen-Image", "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
         "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)},
        (16, 1, 8, 8), (7, 9), more={"attention_mask": ()},
    ),
    Family(
        "HunyuanImage 2.1", "HunyuanImage21",
        HUNYUAN | {"patch_size": [1, 1], "in_channels": 64, "out_channels": 64, "vec_in_dim": None, "axes_dim": [8, 8], "byt5": True},
        (64, 4, 4), (7, 9), more={"attention_mask": (), "conditioning_byt5small": (5, 1472)}, later=HUNYUAN_LATER,
    ),
    Family("Cosmos Predict2", "CosmosT2IPredict2", PREDICT2, (16, 1, 8, 8)),
    Family("Cosmos Predict2 I2V", "CosmosI2VPredict2", PREDICT2 | {"in_channels": 17}, (16, 1, 8, 8)),
    Family(
        "Cosmos", "CosmosT2V",
        COSMOS | {"image_model": "cosmos", "pos_emb_learnable": False, "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True,
         "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable"},
        (16, 1, 8, 8),
    ),
    Family("Wan 2.1", "WAN21_T2V", WAN, (16, 1, 8, 8)),
    Family("Wan 2.2 5B", "WAN22_T2V", WAN | {"in_dim": 48, "out_dim": 48}, (48, 1, 4, 4)),
    Family("HunyuanVideo", "HunyuanVideo", HUNYUAN, (16, 1, 8, 8), pooled=768, later=HUNYUAN_LATER),
    Family(
        "Mochi", "GenmoMochi",
        {"image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 32, "hidden_size_y": 32,
         "mlp_ratio_x": 384.0, "mlp_ratio_y": 192.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
         "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True,
         "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 32, "t5_token_length": 8, "rope_theta": 10000.0},
        (12, 1, 8, 8), (8, 8), more={"attention_mask": ()},
    ),
]  # fmt: skip


def build(family: Family):
    """The family's ModelPatcher on the CPU; None if this ComfyUI does not know it"""
    if not hasattr(comfy.supported_models, family.model):
        return None
    is_later = hasattr(comfy.supported_models, "ZImage")
    config = getattr(comfy.supported_models, family.model)(family.settings | (family.later if is_later else {}))
    config.set_inference_dtype(torch.float32, None)
    device = torch.device("cpu")
    model = config.get_model({}, "", device=device)
    generator = torch.Generator().manual_seed(0)
    # fresh modules of ComfyUI hold uninitialised memory
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.startswith("diffusion_model.") and value.is_floating_point() and value.numel():
                if value.ndim > 1:
                    value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
                else:
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.02 + (0 if name.endswith("bias") else 1))
    model.diffusion_model.eval()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def encoded(family: Family, prompt: int) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """What a text encoder of this family gives for its first or second prompt: context, pooled, and what else"""
    generator = torch.Generator().manual_seed(prompt)
    tokens = family.tokens[prompt]
    context = torch.randn(1, tokens, family.width, generator=generator)
    pooled = torch.randn(1, family.pooled, generator=generator) if family.pooled else None
    more = {}
    for key, shape in family.more.items():
        shape = shape or (tokens,)
        if "mask" in key:
            more[key] = torch.ones(1, *shape, dtype=torch.long)
        elif key.startswith("t5xxl"):  # without a batch dimension
            more[key] = torch.arange(tokens) if key.endswith("ids") else torch.ones(tokens)
        else:
            more[key] = torch.randn(1, *shape, generator=generator)
    return context, pooled, more


class Fed(ComfyDenoiser):
    """Without a text encoder and an autoencoder: they are not what is proven, and most families' are gigabytes."""

    def __init__(self, model, family: Family, layers=None):
        super().__init__(model, None, None, layers)
        self.family = family
        self._shapes[SIZE] = family.latent

    def encode_prompts(self, prompts):
        return Conditioning.cat([_conditioning(*encoded(self.family, int("second" in p))) for p in prompts])
