"""Training where ComfyUI was started with an attention through which no gradients pass."""

import json
from pathlib import Path

from .comfy_server import PACK, run_in_comfyui


def test_every_layer_learns_where_attention_is_a_kernel_without_a_backward(tmp_path):
    run_in_comfyui(Path(__file__).with_name("attention_in_process.py"), PACK, tmp_path / "library", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["chosen"] == "attention_sage" and found["drawn"] > 0  # what is drawn is drawn with it, before and after
    assert found["through"] == 0
    assert found["layers"] > 20 and found["still"] == []
    assert all(found["left"])
