"""ComfyUI's real model classes, at tiny widths with random weights: each trains, and the stock loader reads what it made."""

import json
import math
from pathlib import Path

import pytest

from .comfy_server import PACK, run_in_comfyui

# every way in which families differ: UNet with and without size conditioning, joint and single blocks, several texts,
# masks, one more dimension, prompts of unequal lengths.  `python -m benchmarks.models` does them all.
FAMILIES = ["SD1.5", "SDXL", "SD3.5", "Flux.1", "Chroma", "HunyuanDiT", "Lumina 2", "HiDream", "Qwen-Image"]
NOT_USED = {
    # nothing reads the text that the last block makes
    "Qwen-Image": [f"diffusion_model.transformer_blocks.1.attn.{n}" for n in ("add_q_proj", "to_add_out")],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    output = tmp_path_factory.mktemp("families") / "rows.json"
    run_in_comfyui(PACK / "benchmarks" / "comfy_models.py", output, *FAMILIES)
    return {row["family"]: row for row in json.loads(output.read_text(encoding="utf-8"))["rows"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_and_the_stock_loader_reads_it(rows, family):
    row = rows[family]
    assert "failed" not in row, row["failed"]
    assert row["finite"] and row["loss_after"] < row["loss_before"]
    assert row["unused"] == NOT_USED.get(family, [])  # lora_up of every other layer moved from zero
    assert row["stock_layers"] == row["layers"] > 0 and row["warnings"] == []
    assert row["stock_differs"] < 1e-3  # what the stock loader patches is what was trained
    assert row["weights_kept"] and row["hooks_left"] == 0


def test_families_are_trained_and_patched_on_a_device_that_is_not_main_memory(tmp_path):
    """On a pretended one, which refuses what a GPU refuses"""
    script = Path(__file__).with_name("device_in_process.py")
    run_in_comfyui(script, PACK, tmp_path / "out.json", *FAMILIES)
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found) == FAMILIES
    for row in found.values():
        assert row["device"] == "meta" and all(map(math.isfinite, row["losses"]))
        assert row["missing"] == [] and row["moved"] > 0
