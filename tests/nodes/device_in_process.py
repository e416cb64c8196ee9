"""Run by ComfyUI's own python (not by pytest): families trained, and stacks patched, on a device that is pretended.

argv: ComfyUI checkout, this pack, output file (JSON), names of families.
"""

import json
import sys
from pathlib import Path

comfy_root, pack, output = map(Path, sys.argv[1:4])
names = sys.argv[4:]
sys.path[:0] = [str(pack / "benchmarks"), str(pack / "tests" / "core")]

from comfy_process import start  # noqa: E402

start(comfy_root, pack)

import comfy.model_management as management  # noqa: E402
import torch  # noqa: E402
from comfy_families import FAMILIES, PROMPTS, SIZE, Fed, build  # noqa: E402
from pretended_device import pretended_device  # noqa: E402
from seqlora_pack.nodes.comfy_patches import Part, patch_model  # noqa: E402
from seqlora_pack.nodes.comfy_weights import Weights  # noqa: E402
from seqlora_pack.seqlora_core.calibration import Calibration  # noqa: E402
from seqlora_pack.seqlora_core.concept import References  # noqa: E402
from seqlora_pack.seqlora_core.config import TrainingConfig  # noqa: E402
from seqlora_pack.seqlora_core.drawing import draw  # noqa: E402
from seqlora_pack.seqlora_core.trainer import fit  # noqa: E402

# ComfyUI asks the driver of a device that is no processor
MEMORY = 1 << 40
management.get_free_memory = lambda device=None, torch_free_too=False: (MEMORY, MEMORY) if torch_free_too else MEMORY
management.get_total_memory = lambda device=None, torch_total_too=False: (MEMORY, MEMORY) if torch_total_too else MEMORY
management.soft_empty_cache = lambda force=False: None
management.vram_state = management.VRAMState.NORMAL_VRAM
config = TrainingConfig(rank=2, steps=2, learning_rate=3e-2, batch=2, replay_batch=2, use_decoys=False, planned=4)
found = {}
for family in FAMILIES:
    if family.name not in names:
        continue
    model = build(family)
    with pretended_device() as device, torch.inference_mode(False), torch.enable_grad():
        model.load_device = device
        with Fed(model, family) as denoiser:
            latents = torch.randn(2, *family.latent, generator=torch.Generator().manual_seed(1))
            drawn = draw(denoiser, PROMPTS, 0, SIZE, steps=2)
            calibration = Calibration(drawn.moments, PROMPTS, drawn.latents, visited=drawn.visited)
            result = fit(denoiser, References(latents, PROMPTS, SIZE), "first", [], calibration, config)
            x, sigma, prompts = latents.to(device), denoiser.even_sigmas(2), denoiser.encode_prompts(PROMPTS)
            with torch.no_grad():
                plain = denoiser.predict(x, sigma, prompts)
        patched, _, missing = patch_model(model, None, [Part("first", 1.0, result.adapter)], Weights(model, None))
        with Fed(patched, family) as denoiser, torch.no_grad():
            moved = (denoiser.predict(x, sigma, prompts) - plain).abs().max().item()
    found[family.name] = {"device": str(plain.device), "losses": result.losses, "missing": missing, "moved": moved}
output.write_text(json.dumps(found))
