"""ComfyUI and diffusers agree on the demo model, and the stack is the sum of its parts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seqlora_core.adapter import concatenate
from seqlora_core.attach import Attachment, attached
from seqlora_core.config import TrainingConfig
from seqlora_core.demo import load_subject
from seqlora_core.library import Library
from seqlora_core.noise_levels import draw_sigmas
from seqlora_core.teach import train_concept

from .comfy_server import PACK, run_in_comfyui


@pytest.fixture(scope="module")
def library(model, calibration, tmp_path_factory):
    library = Library(tmp_path_factory.mktemp("agree") / "l", model.fingerprint(), create=True)
    library.keep_calibration(calibration)
    for name in ("octopus", "penguin"):
        s = load_subject(model, name)
        train_concept(model, library, s.images, name, s.trigger, s.class_noun, s.references.captions, TrainingConfig(steps=12))
    return library


@pytest.fixture(scope="module")
def comfy(library, tmp_path_factory):
    output = tmp_path_factory.mktemp("agree") / "out.safetensors"
    run_in_comfyui(Path(__file__).with_name("in_process.py"), PACK, library.folder, output)
    return load_file(output)


@torch.no_grad()
def predict(model, adapter):
    prompts = ["an octzu animal, red background", "a castle on the left and a fish on the right, blue background"]
    generator = torch.Generator().manual_seed(5)
    latents, noise = torch.randn(2, 16, 8, 8, generator=generator), torch.randn(2, 16, 8, 8, generator=generator)
    sigma, attachment = torch.tensor([0.25, 0.75]), Attachment()
    attachment.set_frozen(adapter)
    with attached(model.sites(), attachment):
        return model.predict(model.noised(latents, noise, sigma), sigma, model.encode_prompts(prompts))


@pytest.mark.parametrize("name", ["plain", "stack"])
def test_denoisers_agree(model, library, comfy, name):
    adapter = concatenate([c.adapter for c in library.concepts()]) if name == "stack" else None
    assert (predict(model, adapter) - comfy[name]).abs().max() < 1e-3


def test_a_cancel_ends_a_preview(comfy):
    assert "cancelled" in comfy


def test_connected_images_that_are_on_a_gpu_are_taken_from_there(comfy):
    for what in ("pictures", "masks"):
        assert torch.equal(comfy[f"{what}_away"], comfy[f"{what}_here"]) and comfy[f"{what}_here"].any()


def test_connected_images_that_are_none_or_no_numbers_are_told_and_grey_ones_are_taken(comfy):
    told = " ".join(comfy)
    assert (
        "empty: the connected batch holds no images" in told and "broken: connected image 1 holds values that are not" in told
    )
    assert comfy["grey"].shape == (1, 64, 64, 3) and comfy["grey"].mean().item() == pytest.approx(0.5, abs=0.01)


def test_text_encoders_and_autoencoders_agree(model, comfy):
    prompts = ["an octzu animal, red background", "a castle on the left and a fish on the right, blue background"]
    ours = model.encode_prompts(prompts).context
    assert (comfy["context"][..., :64] - ours).abs().max() < 1e-3 and comfy["context"][..., 64:].abs().max() == 0
    images = torch.linspace(0, 1, 64 * 64 * 3).reshape(1, 64, 64, 3)
    assert (model.encode_images(images) - comfy["encoded"]).abs().max() < 2e-3


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "shifted"])
def test_noise_levels_that_are_asked_for_are_the_same_in_both_hosts(model, comfy, kind):
    """ComfyUI's own shift, which is for sampling, does not come on top"""
    ours = draw_sigmas(model, TrainingConfig(timesteps=kind), 500, torch.Generator().manual_seed(0))
    assert (comfy[f"levels_{kind}"] - ours).abs().max() <= 1e-3


def test_both_hosts_name_the_base_model_alike(model, comfy):
    assert f"fingerprint_{model.fingerprint()}" in comfy


def test_the_stack_is_the_sum_of_its_parts_through_the_stock_loader(comfy):
    keys = [k.removeprefix("ours.") for k in comfy if k.startswith("ours.")]
    assert len(keys) == len([k for k in comfy if k.startswith("stock.")]) == 11
    for key in keys:
        ours, stock = comfy[f"ours.{key}"], comfy[f"stock.{key}"]
        assert (ours - stock).abs().max() <= 1e-5 * stock.abs().max()


def test_weights_are_made_trainable_without_a_copy_and_given_back(comfy):
    ready = {k: v for k, v in comfy.items() if k.startswith("ready.")}
    assert len(ready) > 50 and all(v.all() for v in ready.values()), [k for k, v in ready.items() if not v.all()]
    assert comfy["restored"].all()
