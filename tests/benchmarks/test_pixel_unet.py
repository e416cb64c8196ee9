"""The second architecture of the tables trains, resumes and learns a concept, at its smallest width."""

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import pixel_unet
from benchmarks.pixel_unet import PATCH, SIZE, PixelUNet, build_unet
from seqlora_core.calibration import calibrate
from seqlora_core.config import TrainingConfig
from seqlora_core.demo import load_generic, load_subject
from seqlora_core.errors import UserError
from seqlora_core.evaluation import held_out_loss
from seqlora_core.library import Library
from seqlora_core.teach import train_concept

WIDTHS = (32,)


@pytest.fixture(scope="module")
def tiny() -> PixelUNet:
    torch.manual_seed(0)
    return PixelUNet(build_unet(WIDTHS))


def test_pictures_go_in_and_come_out_as_they_are(tiny):
    images = torch.rand(2, SIZE, SIZE, 3)
    latents = tiny.encode_images(images)
    assert latents.shape == (2, *tiny.latent_shape((SIZE, SIZE))) == (2, 3 * PATCH**2, SIZE // PATCH, SIZE // PATCH)
    assert torch.allclose(tiny.decode(latents), images, atol=1e-6)
    drawn = tiny.sample(tiny.encode_prompts(["a frog", "a lion"]), seed=0, steps=2, guidance=2.0)
    assert drawn.shape == latents.shape and drawn.isfinite().all()


def test_a_concept_is_taught_and_changes_what_it_is_called_by(tiny, tmp_path):
    subject = load_subject(tiny, "octopus")
    library = Library(tmp_path / "library", tiny.fingerprint(), 2, create=True)
    library.keep_calibration(calibrate(tiny, (SIZE, SIZE), 8))
    config = TrainingConfig(steps=15, rank=2, replay_batch=2)
    texts = subject.references.captions
    concept, fit = train_concept(
        tiny, library, subject.images, "octopus", subject.trigger, subject.class_noun, texts, config
    )  # fmt: skip
    assert set(concept.adapter.layers) == {s.name for s in tiny.sites()}
    assert all(layer.up.abs().max() > 0 for layer in concept.adapter.layers.values())
    assert held_out_loss(tiny, subject.held_out, concept.adapter) < held_out_loss(tiny, subject.held_out)
    assert len(fit.losses) == 15


def test_its_text_encoder_is_not_adapted(tiny):
    with pytest.raises(UserError, match="text encoder"):
        tiny.adapt_text(True)


def test_base_training_goes_on_where_it_was_stopped(tmp_path):
    """On a few of the demo's pictures; the command's own are made from npm packages"""
    (tmp_path / "pixels").mkdir()
    maker = PixelUNet(build_unet(WIDTHS))
    subject = load_subject(maker, "fox")
    pictures = subject.images.movedim(-1, 1).mul(2).sub(1).half().repeat(4, 1, 1, 1)
    tokens = maker.reader.tokenize(subject.references.captions * 4).int()
    save_file({"latents": pictures.contiguous(), "tokens": tokens}, tmp_path / "pixels" / "000.safetensors")
    first = pixel_unet.train(tmp_path, 0.02, batch=4, widths=WIDTHS)
    second = pixel_unet.train(tmp_path, 0.06, batch=4, widths=WIDTHS)
    assert 0 < first["steps"] < second["steps"] and second["samples"] == 4 * second["steps"]
    assert second["held_out"] < first["held_out"]


def test_the_trained_model_reads_its_prompts():
    """Known subjects are foreseen better from their own captions than from one another's"""
    model = PixelUNet()
    generic = load_generic(model)
    right = held_out_loss(model, generic)
    generic.conditioning = generic.conditioning[torch.arange(len(generic.latents)).roll(len(generic.latents) // 2)]
    assert right < 0.95 * held_out_loss(model, generic)
