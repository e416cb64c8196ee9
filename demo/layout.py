"""The demo model's denoiser in SD3's stock layout."""

from __future__ import annotations

import torch


def stock_denoiser(weights: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """diffusers' SD3Transformer2DModel -> stock MMDiT names, text inputs padded with zeros to SD3's widths."""
    width = 64 * depth
    out = {
        "pos_embed": weights["pos_embed.pos_embed"],
        "context_embedder.weight": torch.nn.functional.pad(weights["context_embedder.weight"], (0, 4096 - 64)),
        "context_embedder.bias": weights["context_embedder.bias"],
        "y_embedder.mlp.0.weight": torch.nn.functional.pad(weights["time_text_embed.text_embedder.linear_1.weight"], (0, 1280)),
        "y_embedder.mlp.0.bias": weights["time_text_embed.text_embedder.linear_1.bias"],
    }
    plain = {
        "x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2", "final_layer.linear": "proj_out",
    }  # fmt: skip
    for stock, ours in plain.items():
        for part in ("weight", "bias"):
            out[f"{stock}.{part}"] = weights[f"{ours}.{part}"]

    def scale_shift_swapped(t):  # stock: shift first, diffusers: scale first
        first, second = t.chunk(2)
        return torch.cat([second, first])

    for part in ("weight", "bias"):
        out[f"final_layer.adaLN_modulation.1.{part}"] = scale_shift_swapped(weights[f"norm_out.linear.{part}"])
    for i in range(depth):
        ours, last = f"transformer_blocks.{i}.", i == depth - 1
        for block, qkv, norm, attn_out, modulation, mlp in (
            ("x_block", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "attn.to_out.0", "norm1.linear", "ff"),
            ("context_block", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"),
             "attn.to_add_out", "norm1_context.linear", "ff_context"),
        ):  # fmt: skip
            stock = f"joint_blocks.{i}.{block}."
            pre_only = last and block == "context_block"
            for part in ("weight", "bias"):
                out[f"{stock}attn.qkv.{part}"] = torch.cat([weights[f"{ours}attn.{k}.{part}"] for k in qkv])
                value = weights[f"{ours}{modulation}.{part}"]
                out[f"{stock}adaLN_modulation.1.{part}"] = scale_shift_swapped(value) if pre_only else value
                if not pre_only:
                    out[f"{stock}attn.proj.{part}"] = weights[f"{ours}{attn_out}.{part}"]
                    out[f"{stock}mlp.fc1.{part}"] = weights[f"{ours}{mlp}.net.0.proj.{part}"]
                    out[f"{stock}mlp.fc2.{part}"] = weights[f"{ours}{mlp}.net.2.{part}"]
            for stock_norm, our_norm in zip(("ln_q", "ln_k"), norm):
                out[f"{stock}attn.{stock_norm}.weight"] = weights[f"{ours}attn.{our_norm}.weight"]
    assert out["x_embedder.proj.bias"].shape == (width,)
    return out
