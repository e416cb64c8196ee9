"""Models packed as GGUF, which ComfyUI-GGUF loads: stacked onto, calibrated and trained on in a real server.

Its checkout is looked for in ~/comfy/interop, or where INTEROP_PACKS says: git clone https://github.com/city96/ComfyUI-GGUF;
it wants `gguf` in ComfyUI's python.
"""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from seqlora_core.adapter import load_adapter
from seqlora_core.demo_model import DEMO_FOLDER, DEMO_MODEL

from .comfy_server import Server, find_comfyui
from .test_other_packs import pack
from .test_stack_files import save
from .test_training import BASE, draw, pixels, train

FILES = ("seqlora_demo_fox", "seqlora_demo_penguin")
PACKED = BASE | {"9": {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "demo.gguf"}}}
LAYER = "diffusion_model.joint_blocks.1.x_block.attn.proj"
MODEL, CLIP = ["9", 0], ["1", 1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = find_comfyui()
    if isinstance(found, str):
        pytest.skip(found)
    source, base = pack("ComfyUI-GGUF"), tmp_path_factory.mktemp("gguf")
    models, loras = base / "models" / "diffusion_models", base / "models" / "loras"
    models.mkdir(parents=True)
    script = Path(__file__).with_name("packed_in_process.py")
    done = subprocess.run([found[1], script, DEMO_MODEL, models / "demo.gguf"], capture_output=True, text=True)
    if "No module named 'gguf'" in done.stderr:
        pytest.skip("ComfyUI's python has no gguf: pip install gguf")
    assert done.returncode == 0, done.stderr
    shutil.copytree(source, base / "custom_nodes" / source.name, ignore=shutil.ignore_patterns(".git"))
    loras.mkdir(parents=True)
    for name in FILES:
        shutil.copy(DEMO_FOLDER / "loras" / f"{name}.safetensors", loras)
    server = Server(*found, base)
    yield server
    server.stop()


def stock():
    """The same LoRAs, chained"""
    nodes, last = {}, "9"
    for number, name in zip(("40", "41"), FILES):
        inputs = {"model": [last, 0], "lora_name": f"{name}.safetensors", "strength_model": 1.0}
        nodes[number], last = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}, number
    return draw(PACKED | nodes, [last, 0], CLIP)


def stack(names):
    return {"3": {"class_type": "SeqLoRALibrary", "inputs": {"library": "", "concepts": "\n".join(names), "strength": 1.0}}}


def applied(mode, graph):
    inputs = {"model": MODEL, "clip": CLIP, "stack": ["3", 0], "mode": mode, "amount": 1.0}
    return draw(PACKED | graph | {"5": {"class_type": "SeqLoRAApplyStack", "inputs": inputs}}, ["5", 0], ["5", 1])


def difference(server, one, other):
    one, other = (pixels(server, server.run(graph)).astype(int) for graph in (one, other))
    return np.abs(one - other).max()


def test_a_stack_does_what_chained_stock_loaders_do(server):
    assert difference(server, stock(), draw(PACKED, MODEL, CLIP)) > 50
    assert difference(server, applied("sum", stack(FILES)), stock()) <= 1


def test_what_is_packed_is_read_as_its_numbers(server):
    """A LoRA of weights' sizes (DoRA) changes a weight by what that is: half as much again here"""
    weight = load_file(DEMO_MODEL)[f"model.{LAYER}.weight"].float()
    dora = {
        f"{LAYER}.lora_down.weight": torch.zeros(2, 192), f"{LAYER}.lora_up.weight": torch.zeros(192, 2),
        f"{LAYER}.dora_scale": 1.5 * weight.norm(dim=1, keepdim=True),
    }  # fmt: skip
    save_file(dora, server.base / "models" / "loras" / "dora.safetensors")
    server.run(PACKED | stack(["dora"]) | save("3", "saved", model=MODEL, clip=CLIP))
    saved = load_adapter(server.base / "models" / "loras" / "saved.safetensors").layers[LAYER].dense()
    assert (saved - 0.5 * weight).norm() < 0.02 * saved.norm()


def test_calibrate_then_stack_by_data(server):
    inputs = {
        "model": MODEL, "clip": CLIP, "vae": ["1", 2], "loras": "\n".join(FILES), "resolution": 64, "pictures": 4, "seed": 0,
        "triggers": f"{FILES[0]}: octzu fox\n{FILES[1]}: pengvo penguin",
    }  # fmt: skip
    calibrated = {"3": {"class_type": "SeqLoRACalibrate", "inputs": inputs}}
    assert difference(server, applied("data", calibrated), applied("sum", calibrated)) > 10


def test_a_concept_is_trained_on_it(server):
    graph = train("packed", steps=30, planned_concepts=1)
    graph["3"]["inputs"] |= {"model": MODEL}
    graph["8"] = {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}}
    said = server.run(PACKED | graph)["8"]["text"][0]
    before, after = map(float, re.search(r"loss ([0-9.]+) to ([0-9.]+);", said).groups())
    assert after < 0.9 * before
    adapter = load_adapter(server.base / "models" / "loras" / "seqlora" / "packed" / "octopus.safetensors")
    assert all(d.acts for d in adapter.layers.values())
