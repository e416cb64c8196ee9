"""Run by ComfyUI's own python (not by pytest): training where ComfyUI's attention is a kernel without a backward.

argv: ComfyUI checkout, this pack, a folder to train into, output file (JSON).
"""

import json
import sys
import types
from pathlib import Path

comfy_root, pack, folder, output = map(Path, sys.argv[1:5])
sys.path.insert(0, str(pack / "benchmarks"))

import torch  # noqa: E402
from comfy_process import start  # noqa: E402


def sageattn(q, k, v, attn_mask=None, is_causal=False, tensor_layout="HND"):
    """As the package's own: autograd knows nothing of what a compiled kernel does"""
    calls.append(torch.is_grad_enabled())
    with torch.no_grad():
        if tensor_layout == "NHD":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return found.transpose(1, 2) if tensor_layout == "NHD" else found


calls: list[bool] = []
sys.modules["sageattention"] = types.ModuleType("sageattention")
sys.modules["sageattention"].sageattn = sageattn
start(comfy_root, pack, "--use-sage-attention")

import comfy.ldm.modules.attention as attention  # noqa: E402
import comfy.ldm.modules.diffusionmodules.mmdit as mmdit  # noqa: E402
import comfy.ops  # noqa: E402
from seqlora_pack.nodes.comfy_demo import load_demo_model  # noqa: E402
from seqlora_pack.nodes.comfy_denoiser import ComfyDenoiser  # noqa: E402
from seqlora_pack.seqlora_core.calibration import calibrate  # noqa: E402
from seqlora_pack.seqlora_core.config import TrainingConfig  # noqa: E402
from seqlora_pack.seqlora_core.demo_model import DEMO_MODEL  # noqa: E402
from seqlora_pack.seqlora_core.library import Library  # noqa: E402
from seqlora_pack.seqlora_core.teach import train_concept  # noqa: E402


def functions():
    return mmdit.optimized_attention, attention.optimized_attention, comfy.ops.scaled_dot_product_attention


before = functions()
model, clip, vae = load_demo_model(DEMO_MODEL)
images = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
config = TrainingConfig(steps=2, batch=2, replay_batch=2, use_decoys=False, text_encoder=True)
with torch.inference_mode(False), torch.no_grad(), ComfyDenoiser(model, clip, vae) as denoiser:
    denoiser.adapt_text(True)
    library = Library(folder, denoiser.fingerprint(), 4, create=True)
    library.keep_calibration(calibrate(denoiser, (64, 64), 4))
    drawn = len(calls)
    with torch.enable_grad():
        concept, fit = train_concept(denoiser, library, images, "thing", "octzu", config=config)
layers = concept.adapter.layers
found = {
    "chosen": attention.optimized_attention.__name__,
    "drawn": drawn,
    "through": sum(calls),
    "layers": len(layers),
    "still": [name for name, delta in layers.items() if not delta.up.any()],
    "left": [after is one for after, one in zip(functions(), before)],
}
output.write_text(json.dumps(found))
