"""Stable Diffusion 1.5, 2 and XL in diffusers: trained at their smallest, and read by the pipelines' own loader."""

import pytest
import torch

from seqlora_core.attach import Attachment, attached
from seqlora_core.calibration import calibrate
from seqlora_core.config import TrainingConfig
from seqlora_core.denoiser import loss
from seqlora_core.library import Library
from seqlora_core.teach import train_concept
from seqlora_core.unet_model import UNetModel

CONFIG = TrainingConfig(
    steps=20, batch=4, replay_batch=3, learning_rate=3e-2, drift_budget=0.0, replay_weight=0.01, use_decoys=False
)


def test_the_vae_of_sdxl_works_in_float32_whatever_the_model_does():
    from benchmarks.tiny import make_pipeline

    whole, half = (UNetModel(make_pipeline("sdxl").to(dtype)) for dtype in (torch.float32, torch.float16))
    images = torch.rand(1, whole.size, whole.size, 3, generator=torch.Generator().manual_seed(0))
    latents, theirs = half.encode_images(images), whole.encode_images(images)
    assert half.unet.dtype == torch.float16 and (latents - theirs).abs().max() < 1e-2 * theirs.abs().max()
    assert half.vae.dtype == latents.dtype == half.decode(latents).dtype == torch.float32


@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl"])
def test_it_is_trained_and_the_pipelines_loader_does_what_was_trained(kind, tmp_path):
    from benchmarks.tiny import make_pipeline

    model = UNetModel(make_pipeline(kind))
    size, generator = (model.size,) * 2, torch.Generator().manual_seed(1)
    library = Library(tmp_path / "l", model.fingerprint(), 4, create=True)
    library.keep_calibration(calibrate(model, size, 4))
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    images = torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    concept, fit = train_concept(model, library, images, "thing", "octzu", config=CONFIG)
    assert all(torch.equal(v, before[k]) for k, v in model.unet.state_dict().items())
    assert torch.tensor(fit.losses).isfinite().all() and all(d.up.any() for d in concept.adapter.layers.values())
    assert {s.name for s in model.sites()} == set(concept.adapter.layers)

    latents, prompts = model.encode_images(images[:1]).expand(16, -1, -1, -1), model.encode_prompts(["a octzu"] * 16)
    noise, levels = torch.randn(latents.shape, generator=generator), model.even_sigmas(16)
    one_batch, attachment = (latents, noise, levels, prompts), Attachment()
    x = model.noised(latents, noise, levels)
    with torch.no_grad():
        untaught, bare = loss(model, *one_batch), model.predict(x, levels, prompts)
        attachment.set_frozen(concept.adapter)
        with attached(model.sites(), attachment):
            taught, ours = loss(model, *one_batch), model.predict(x, levels, prompts)
        model.pipeline.load_lora_weights(library.folder, weight_name="thing.safetensors")
        theirs = model.predict(x, levels, prompts)
    assert taught < 0.97 * untaught
    assert torch.linalg.norm(theirs - ours) < 1e-3 * torch.linalg.norm(ours - bare)
