"""Run by ComfyUI's own python (not by pytest): weights of diffusers' SD3 and Flux.1 in ComfyUI's own classes.

argv: ComfyUI checkout, this pack, a folder of transformers by diffusers, output file (safetensors).  Predicts what the test asks
for and names the layers that adapters act on.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

comfy_root, pack, folder, output = map(Path, sys.argv[1:5])
sys.path.insert(0, str(pack / "benchmarks"))

from comfy_process import start  # noqa: E402

start(comfy_root, pack)

import comfy.model_detection  # noqa: E402
import torch  # noqa: E402
from comfy_families import FAMILIES, Fed, build  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from seqlora_pack.nodes.comfy_denoiser import _conditioning  # noqa: E402
from seqlora_pack.seqlora_core.adapter import load_adapter  # noqa: E402
from seqlora_pack.seqlora_core.attach import Attachment, attached  # noqa: E402
from seqlora_pack.seqlora_core.denoiser import Conditioning  # noqa: E402

TEXT = {"context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}}}
WIDTHS = {
    "sd3": ("SD3", TEXT | {"adm_in_channels": 64}),
    "sd35": ("SD3.5", TEXT | {"adm_in_channels": 64}),
    "flux": ("Flux.1", {"mlp_ratio": 4.0, "vec_in_dim": 32}),
}
tensors, said = {}, {}
for kind, (name, widths) in WIDTHS.items():
    family = next(f for f in FAMILIES if f.name == name)
    model = build(replace(family, settings=family.settings | widths))
    weights = load_file(folder / kind / "diffusion_pytorch_model.safetensors")
    converted = comfy.model_detection.convert_diffusers_mmdit(dict(weights), "")
    if "pos_embed.pos_embed" in weights:  # ComfyUI's conversion leaves it to the model, which here has random weights
        converted["pos_embed"] = weights["pos_embed.pos_embed"]
    missing, unexpected = model.model.diffusion_model.load_state_dict(converted, strict=False)
    asked = load_file(folder / f"{kind}.inputs.safetensors")
    adapter = load_adapter(folder / f"{kind}.adapter.safetensors")
    with torch.inference_mode(False), torch.no_grad(), Fed(model, family) as denoiser:
        prompts = Conditioning.cat([_conditioning(c[None], p[None], {}) for c, p in zip(asked["context"], asked["pooled"])])
        attachment = Attachment()
        for what in ("plain", "adapted"):
            attachment.set_frozen(adapter if what == "adapted" else None)
            with attached(denoiser.sites(), attachment):
                found = denoiser.predict(asked["noised"], asked["sigma"], prompts)
            # errors are the velocity's, but the prediction leaves out what does not depend on the model
            tensors[f"{kind}.{what}"] = (found + asked["noised"] / asked["sigma"].view(-1, 1, 1, 1)).contiguous()
        said[kind] = json.dumps(
            {
                "missing": sorted(missing), "unexpected": sorted(unexpected), "fingerprint": denoiser.fingerprint(),
                "sites": {s.name: [s.in_features, s.out_features] for s in denoiser.sites()},
                "sigmas": denoiser.even_sigmas(9).tolist(),
            }
        )  # fmt: skip
save_file(tensors, output, said)
