"""Attention projections of diffusers' SD3 and Flux transformers, under ComfyUI's names for them.

Both fuse what reads one input: q, k and v, and in Flux's single blocks the MLP's first layer with them.
"""

from __future__ import annotations

from torch import nn

from .attach import Site


def sd3_sites(transformer: nn.Module) -> list[Site]:
    """Of SD3Transformer2DModel; SD3.5 has a second attention in some blocks"""
    sites = []
    for index, block in enumerate(transformer.transformer_blocks):
        a, second = block.attn, getattr(block, "attn2", None)
        stem = f"diffusion_model.joint_blocks.{index}"
        sites += _attention(f"{stem}.x_block.attn", a.to_q, a.to_k, a.to_v, a.to_out[0])
        sites += _attention(
            f"{stem}.context_block.attn", a.add_q_proj, a.add_k_proj, a.add_v_proj, getattr(a, "to_add_out", None)
        )
        if second is not None:
            sites += _attention(f"{stem}.x_block.attn2", second.to_q, second.to_k, second.to_v, second.to_out[0])
    return sites


def flux_sites(transformer: nn.Module) -> list[Site]:
    """Of FluxTransformer2DModel"""
    sites = []
    for index, block in enumerate(transformer.transformer_blocks):
        a, stem = block.attn, f"diffusion_model.double_blocks.{index}"
        sites += _attention(f"{stem}.img_attn", a.to_q, a.to_k, a.to_v, a.to_out[0])
        sites += _attention(f"{stem}.txt_attn", a.add_q_proj, a.add_k_proj, a.add_v_proj, a.to_add_out)
    for index, block in enumerate(transformer.single_transformer_blocks):
        a, stem = block.attn, f"diffusion_model.single_blocks.{index}"
        sites += [
            _site(f"{stem}.linear1", a.to_q, a.to_k, a.to_v, block.proj_mlp, first=3),
            _site(f"{stem}.linear2", block.proj_out),
        ]
    return sites


def _attention(stem: str, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module | None) -> list[Site]:
    """out: None in the last block of the text's stream, whose result nothing reads"""
    return [_site(f"{stem}.qkv", q, k, v), *([] if out is None else [_site(f"{stem}.proj", out)])]


def _site(name: str, *modules: nn.Module, first: int = 0) -> Site:
    return Site(name, modules, modules[0].weight.shape[1], sum(m.weight.shape[0] for m in modules), first)
