"""Run by ComfyUI's own python (not by pytest): what ComfyUI's denoiser and stock loader make of our files.

argv: ComfyUI checkout, this pack, a library's folder, output file.  Writes predictions and weights as safetensors.
"""

import contextlib
import sys
from pathlib import Path

comfy_root, pack, library, output = map(Path, sys.argv[1:5])
sys.path[:0] = [str(pack / "benchmarks"), str(pack / "tests" / "core")]

from comfy_process import patched_weights, start  # noqa: E402

start(comfy_root, pack)

import comfy.model_management as management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from pretended_device import pretended_device  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from seqlora_pack.nodes.comfy_demo import load_demo_model  # noqa: E402
from seqlora_pack.nodes.comfy_denoiser import ComfyDenoiser  # noqa: E402
from seqlora_pack.nodes.comfy_patches import Part, patch_model  # noqa: E402
from seqlora_pack.nodes.comfy_training import Trainable  # noqa: E402
from seqlora_pack.nodes.comfy_weights import Weights  # noqa: E402
from seqlora_pack.nodes.concept_images import _concept  # noqa: E402
from seqlora_pack.seqlora_core.config import TrainingConfig  # noqa: E402
from seqlora_pack.seqlora_core.demo_model import DEMO_MODEL  # noqa: E402
from seqlora_pack.seqlora_core.errors import UserError  # noqa: E402
from seqlora_pack.seqlora_core.library import Library  # noqa: E402
from seqlora_pack.seqlora_core.noise_levels import draw_sigmas  # noqa: E402

prompts = ["an octzu animal, red background", "a castle on the left and a fish on the right, blue background"]
generator = torch.Generator().manual_seed(5)
latents, noise = torch.randn(2, 16, 8, 8, generator=generator), torch.randn(2, 16, 8, 8, generator=generator)
sigma = torch.tensor([0.25, 0.75])
model, clip, vae = load_demo_model(DEMO_MODEL)
adapters = [c.adapter for c in Library(library).concepts()]
out = {}


def predict(name, patched):
    with torch.inference_mode(False), torch.no_grad(), ComfyDenoiser(patched, clip, vae) as d:
        x = d.noised(latents, noise, sigma)
        # native error = predicted x0 / scale; in velocity, v = (x - x0) / sigma
        error = d.predict(x, sigma, d.encode_prompts(prompts))
        x0 = error * d._error_scale(sigma, 4)
        out[name] = ((x - x0) / sigma.view(-1, 1, 1, 1)).contiguous()
        out["context"] = d.encode_prompts(prompts).context.contiguous()
        out["fingerprint_" + d.fingerprint()] = torch.zeros(1)


predict("plain", model)
with torch.inference_mode(False), torch.no_grad(), ComfyDenoiser(model, clip, vae) as d:
    for kind in ("uniform", "logit_normal", "shifted"):
        out[f"levels_{kind}"] = draw_sigmas(
            d, TrainingConfig(timesteps=kind), 500, torch.Generator().manual_seed(0)
        ).contiguous()
parts = [Part(str(i), 1.0, a) for i, a in enumerate(adapters)]
stacked, _, missing = patch_model(model, None, parts, Weights(model, None))
assert not missing, missing
predict("stack", stacked)
chained = model
for name in Library(library).names:
    file = comfy.utils.load_torch_file(str(library / f"{name}.safetensors"), safe_load=True)
    chained = comfy.sd.load_lora_for_models(chained, None, file, 1.0, 0.0)[0]
for kind, patched in (("ours", stacked), ("stock", chained)):
    for key, value in patched_weights(patched).items():
        out[f"{kind}.{key}"] = value.float().contiguous()
with torch.inference_mode():  # as the executor loads models
    loaded = load_demo_model(DEMO_MODEL)[0]
parameters = list(loaded.model.named_parameters())
trainable = Trainable(loaded.model, loaded.model.diffusion_model)
trainable.prepare()
for (name, before), (_, now) in zip(parameters, loaded.model.named_parameters()):
    out[f"ready.{name}"] = torch.tensor([before.is_inference(), not now.is_inference(), now.data_ptr() == before.data_ptr()])
trainable.close()
out["restored"] = torch.tensor([a is b for (_, a), b in zip(parameters, loaded.model.parameters())])
with torch.inference_mode(False), torch.no_grad(), ComfyDenoiser(model, clip, vae) as d:
    d.cancel.hold()  # as a preview is drawn while a concept is trained
    management.interrupt_current_processing()
    try:
        d.sample(d.encode_prompts(prompts), 0, 3, 4.0, (64, 64))
    except management.InterruptProcessingException:
        out["cancelled"] = torch.zeros(1)
for kind, images in {"empty": torch.zeros(0, 64, 64, 3), "broken": torch.full((1, 64, 64, 3), torch.nan)}.items():
    try:
        _concept([images], None, "", 64, "")
    except UserError as error:
        out[f"{kind}: {error}"] = torch.zeros(1)
out["grey"] = _concept([torch.full((1, 64, 64, 1), 0.5)], None, "", 64, "").images.contiguous()
images = torch.linspace(0, 1, 64 * 64 * 3).reshape(1, 64, 64, 3)
for kind, there in (("here", contextlib.nullcontext("cpu")), ("away", pretended_device())):
    with there as device:
        made = _concept([images.to(device)], [images[..., 0].to(device)], "", 32, "").sets[0]
    out |= {f"pictures_{kind}": made.images.contiguous(), f"masks_{kind}": made.masks.contiguous()}
with torch.inference_mode():
    out["encoded"] = vae.encode(images).float().clone().contiguous()
out["encoded"] = model.model.process_latent_in(out["encoded"].clone()).contiguous()
save_file(out, output)
