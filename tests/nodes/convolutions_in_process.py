"""Run by ComfyUI's own python (not by pytest): LoRAs of every 3 x 3 convolution of a small SD1.5, recorded and stacked.

argv: ComfyUI checkout, this pack, output file (JSON).
"""

import json
import sys
from pathlib import Path

comfy_root, pack, output = map(Path, sys.argv[1:4])
sys.path.insert(0, str(pack / "benchmarks"))

from comfy_process import patched_weights, start  # noqa: E402

start(comfy_root, pack)

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy_families import FAMILIES, SIZE, Fed, build  # noqa: E402
from seqlora_pack.nodes.comfy_lora_files import fit  # noqa: E402
from seqlora_pack.nodes.comfy_patches import Part, patch_model  # noqa: E402
from seqlora_pack.nodes.comfy_sites import file_names  # noqa: E402
from seqlora_pack.nodes.comfy_weights import Weights  # noqa: E402
from seqlora_pack.seqlora_core.adapter import concatenate  # noqa: E402
from seqlora_pack.seqlora_core.calibration import calibrate, record_moments  # noqa: E402
from seqlora_pack.seqlora_core.composition import project  # noqa: E402
from seqlora_pack.seqlora_core.drawing import draw  # noqa: E402

family = FAMILIES[0]
model = build(family)
names = file_names(model.model)
convolutions = {
    path: module
    for path, module in model.model.diffusion_model.named_modules()
    if isinstance(module, torch.nn.Conv2d) and module.weight.shape[2:] == (3, 3) and path in names
}
generator = torch.Generator().manual_seed(0)


def lora() -> dict:
    """As LoCon writes it; random, and strong enough to move what later layers see"""
    tensors = {}
    for path, module in convolutions.items():
        out, width = module.weight.shape[:2]
        tensors[f"{names[path]}.lora_down.weight"] = torch.randn(4, width, 3, 3, generator=generator) / (9 * width) ** 0.5
        tensors[f"{names[path]}.lora_up.weight"] = 0.5 * torch.randn(out, 4, 1, 1, generator=generator)
        tensors[f"{names[path]}.alpha"] = torch.tensor(4.0)
    return tensors


class Inputs:
    """What every convolution is given while this is entered"""

    def __enter__(self):
        self.of = {path: [] for path in convolutions}
        keep = [(m, lambda _, given, kept=self.of[p]: kept.append(given[0].detach().clone())) for p, m in convolutions.items()]
        self.handles = [module.register_forward_pre_hook(hook) for module, hook in keep]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


files = [lora(), lora()]
weights = Weights(model, None)
adapters = [fit(dict(f), {}, weights, "lora").adapter for f in files]
layers = set(adapters[0].layers)
prompts = ["a first prompt", "a second prompt"]
moments, seen, wrong = [], [], 0.0
with torch.inference_mode(False), torch.no_grad():
    with Fed(model, family, layers) as denoiser:
        general = calibrate(denoiser, SIZE, 8, prompts * 4)
        with Inputs() as inputs:
            record_moments(denoiser, general.latents, denoiser.encode_prompts(general.prompts))
        seen.append(inputs.of)
    for prompt, adapter in zip(prompts, adapters):
        patched, _, missing = patch_model(model, None, [Part("a", 1.0, adapter)], weights)
        assert not missing, missing
        with Fed(patched, family, layers) as denoiser:
            latents = draw(denoiser, [prompt] * 4, 0, SIZE).latents
            with Inputs() as inputs:
                moments.append(record_moments(denoiser, latents, denoiser.encode_prompts([prompt] * 4)))
        patched.detach()
        seen.append(inputs.of)
        for path in convolutions:
            x = torch.cat([g.movedim(1, -1).flatten(0, -2) for g in inputs.of[path]]).double()
            wanted = x.mT @ x / len(x)
            wrong = max(wrong, float((moments[-1][names[path]].double() - wanted).norm() / wanted.norm()))
    stacks = {mode: concatenate(project(adapters, mode, 1.0, moments, general.moments)) for mode in ("sum", "data")}
    patched = {m: patched_weights(patch_model(model, None, [Part("s", 1.0, s)], weights)[0]) for m, s in stacks.items()}
    stock = model
    for file in files:
        stock = comfy.sd.load_lora_for_models(stock, None, dict(file), 1.0, 0.0)[0]
    stock = patched_weights(stock)
    plain = model.model.state_dict()

    def moved(mode: str) -> float:
        """What the stack does too much or too little, over what the LoRAs do; by the convolutions themselves, on what they were given"""
        error = effect = 0.0
        for path, module in convolutions.items():
            key, where = f"diffusion_model.{path}.weight", dict(stride=module.stride, padding=module.padding)
            change = patched[mode][key] - plain[key]
            for given, adapter in zip(seen, [None, *adapters]):
                own = 0 * change if adapter is None else adapter.layers[names[path]].dense().view_as(change)
                for x in given[path]:
                    error += torch.nn.functional.conv2d(x, change - own, **where).square().sum().item()
                    effect += torch.nn.functional.conv2d(x, own, **where).square().sum().item()
        return error / effect

    out = {
        "convolutions": len(convolutions),
        "patched": len(patched["sum"]),
        "outer": [names.get(path) for path in ("input_blocks.0.0", "out.2", "time_embed.0")],
        "moments_wrong": wrong,
        "stock_differs": max(
            float((patched["sum"][k] - stock[k]).abs().max() / (stock[k] - plain[k]).abs().max()) for k in stock
        ),
        "moved": {mode: moved(mode) for mode in stacks},
    }
output.write_text(json.dumps(out))
