"""ComfyUI's own class of SD1.5's UNet at its real size, with random weights.  Imported inside ComfyUI's python only."""

import comfy.model_patcher
import comfy.supported_models
import torch

SETTINGS = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3, "num_heads": 8, "context_dim": 768, "use_spatial_transformer": True,
    "use_linear_in_transformer": False, "legacy": False, "adm_in_channels": None, "use_temporal_attention": False,
}  # fmt: skip


def build(dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    model = comfy.supported_models.SD15({**SETTINGS, "dtype": dtype}).get_model({}, "", "cpu")
    torch.manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 0.02)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
