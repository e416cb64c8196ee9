"""LoRAs of 3 x 3 convolutions on ComfyUI's own SD1.5 class: recorded, summed as the stock loader does, projected."""

import json
from pathlib import Path

from .comfy_server import PACK, run_in_comfyui


def test_convolutions_are_recorded_and_projected(tmp_path):
    run_in_comfyui(Path(__file__).with_name("convolutions_in_process.py"), PACK, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["patched"] == found["convolutions"] >= 10
    assert found["outer"] == ["lora_unet_conv_in", "lora_unet_conv_out", "lora_unet_time_embedding_linear_1"]
    assert found["moments_wrong"] < 1e-4  # against what the convolutions were given
    assert found["stock_differs"] < 1e-5
    assert found["moved"]["data"] < 0.5 * found["moved"]["sum"]
