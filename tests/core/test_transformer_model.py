"""SD3, SD3.5 and Flux.1 from diffusers folders: trained, drawn with, and refused where they cannot do what is asked."""

import pytest
import torch

from benchmarks.tiny import make_pipeline
from seqlora_core.adapter import Adapter, LayerDelta, load_adapter, save_adapter
from seqlora_core.attach import Attachment, attached
from seqlora_core.calibration import calibrate
from seqlora_core.cli import main
from seqlora_core.config import TrainingConfig
from seqlora_core.demo_model import DEMO_FOLDER
from seqlora_core.diffusers_folder import open_folder
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.teach import train_concept

KINDS, SIZE = ("sd3", "sd35", "flux"), (32, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    for kind in KINDS:
        make_pipeline(kind).save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_of_its_pipeline_is_our_prediction(folder, kind):
    model, calls = open_folder(folder / kind), []
    prompts = model.encode_prompts(["a fox", "a castle"])
    assert len(prompts) == 2 and not torch.equal(prompts.context[0], prompts.context[1])
    handle = model.transformer.register_forward_hook(lambda m, args, kwargs, out: calls.append((kwargs, out)), with_kwargs=True)
    drawn = model.sample(prompts[:1], seed=3, steps=1, guidance=3.5 if kind == "flux" else 1.0, size=SIZE)
    handle.remove()
    x = torch.randn(1, *model.latent_shape(SIZE), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = model.predict(x, torch.ones(1), prompts[:1])
    theirs = calls[0][1][0]
    theirs = model._unpacked(theirs, *x.shape[2:]) if kind == "flux" else theirs
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(drawn, x - ours, atol=1e-4)  # the one step goes from pure noise to the picture


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_scaled_as_the_autoencoder_says(folder, kind):
    model = open_folder(folder / kind)
    images = torch.rand(2, *SIZE, 3, generator=torch.Generator().manual_seed(0))
    latents = model.encode_images(images)
    assert latents.shape == (2, *model.latent_shape(SIZE))
    plain = latents / model.vae.config.scaling_factor + model.vae.config.shift_factor
    with torch.no_grad():
        decoded = model.vae.decode(plain).sample.movedim(1, -1) / 2 + 0.5
    assert torch.allclose(model.decode(latents), decoded.clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_trained_and_every_layer_moves(folder, kind, tmp_path):
    model = open_folder(folder / kind)
    library = Library(tmp_path / "l", model.fingerprint(), 4, create=True)
    library.keep_calibration(calibrate(model, SIZE, 8))
    before = {k: v.clone() for k, v in model.transformer.state_dict().items()}
    images = torch.rand(1, *SIZE, 3, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    config = TrainingConfig(steps=30, batch=4, replay_batch=3, learning_rate=3e-2, drift_budget=0.0, replay_weight=0.01)
    concept, fit = train_concept(model, library, images, "thing", "octzu", config=config)
    assert sum(fit.losses[-8:]) < 0.95 * sum(fit.losses[:8])
    assert all(d.up.any() for d in concept.adapter.layers.values())
    assert {s.name for s in model.sites()} == set(concept.adapter.layers)
    assert all(torch.equal(v, before[k]) for k, v in model.transformer.state_dict().items())
    saved = load_adapter(library.paths("thing")[0])
    architecture = {"flux": "flux-1-dev/lora"}.get(kind, "stable-diffusion-3/lora")
    assert saved.metadata["modelspec.architecture"] == architecture


@pytest.mark.parametrize("kind", KINDS)
def test_a_concept_is_written_for_diffusers_own_loader(folder, kind, tmp_path):
    """The pipeline with the file loaded predicts what the model with the adapter attached does"""
    model, generator = open_folder(folder / kind), torch.Generator().manual_seed(1)
    layers = {
        s.name: LayerDelta(
            torch.randn(2, s.in_features, generator=generator), torch.randn(s.out_features, 2, generator=generator)
        )
        for s in model.sites()
    }
    clip, width = model.pipeline.text_encoder, model.pipeline.text_encoder.config.hidden_size
    text = LayerDelta(torch.randn(2, width, generator=generator), torch.randn(width, 2, generator=generator))
    both = layers | {"lora_te1_text_model_encoder_layers_0_self_attn_q_proj": text}
    save_adapter(tmp_path / "concept.safetensors", Adapter(both))
    given = [f"{tmp_path / 'concept.safetensors'}:0.5", "--output", str(tmp_path / "theirs.safetensors")]
    assert main(["stack", *given, "--diffusers"]) == 0
    x, sigma = torch.randn(1, *model.latent_shape(SIZE), generator=generator), torch.full((1,), 0.7)
    prompt, attachment = model.encode_prompts(["a fox"]), Attachment()
    attachment.set_frozen(Adapter(layers).scaled(0.5), model.device)
    with torch.no_grad():
        plain = model.predict(x, sigma, prompt)
        with attached(model.sites(), attachment):
            ours = model.predict(x, sigma, prompt)
        model.pipeline.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
        theirs = model.predict(x, sigma, prompt)
    read = next(m for n, m in clip.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    assert torch.allclose(read.get_delta_weight("default_0"), 0.5 * text.dense(), atol=1e-5)
    assert torch.allclose(ours, theirs, atol=1e-4 * ours.abs().max()) and (ours - plain).abs().max() > 0.1 * plain.abs().max()


def test_what_is_no_layer_of_these_models_is_told(tmp_path, capsys):
    save_adapter(tmp_path / "c.safetensors", Adapter({"lora_unet_x": LayerDelta(torch.ones(1, 4), torch.ones(4, 1))}))
    assert main(["stack", str(tmp_path / "c.safetensors"), "--diffusers", "--output", str(tmp_path / "o.safetensors")]) == 2
    assert "lora_unet_x is no layer of SD3 or Flux.1" in capsys.readouterr().err


def test_the_command_line_teaches_on_such_a_folder(folder, tmp_path, capsys):
    given = ["--model", str(folder / "sd3"), "--library", str(tmp_path / "l")]
    images = str(DEMO_FOLDER / "concepts" / "fox")
    train = ["train", *given, "--images", images, "--trigger", "foxqi", "--steps", "2"]
    assert main(["calibrate", *given, "--pictures", "4"]) == 0
    assert main([*train, "--learn-trigger"]) == 2
    assert "leave out learn_trigger" in capsys.readouterr().err
    assert main(train) == 0
    assert main(["sample", "a foxqi", *given, "--output", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_that_it_cannot_take_are_told_before_any_work(folder, kind, tmp_path):
    model = open_folder(folder / kind)
    step, most = model.pixel_step, model.largest_side
    assert (step, most) == (4, 0 if kind == "flux" else 64)
    prompt, sigma = model.encode_prompts(["a fox"]), torch.ones(1)
    largest = model.latent_shape((most or 80, step))
    assert model.predict(torch.zeros(1, *largest), sigma, prompt).shape[1:] == largest
    library = Library(tmp_path / "l", model.fingerprint(), 4, create=True)
    for size in ((step, step + 2), *([(step, most + step)] if most else [])):
        with pytest.raises(UserError, match=f"pictures of {size[1]} x {size[0]} pixels do not fit this model"):
            train_concept(model, library, torch.zeros(1, *size, 3), "thing", "octzu")
    assert library.calibration() is None


def test_text_encoders_are_left_alone(folder):
    model = open_folder(folder / "flux")
    model.adapt_text(False)
    for asked in ({"attention": True}, {"attention": False, "tokens": True}):
        with pytest.raises(UserError, match="leave out"):
            model.adapt_text(**asked)
