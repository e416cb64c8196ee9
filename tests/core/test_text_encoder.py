"""The text encoder's LoRA: what is trained of it, how it acts, and that a library is of one kind."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from seqlora_core.attach import Attachment, attached
from seqlora_core.calibration import calibrate
from seqlora_core.config import TrainingConfig
from seqlora_core.demo_model import SIZE, DemoModel
from seqlora_core.denoiser import Conditioning
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.live_prompts import LivePrompts, is_text
from seqlora_core.teach import train_concept

CONFIG = TrainingConfig(steps=6, batch=2, replay_batch=4, text_encoder=True, rank=2)


@pytest.fixture(scope="module")
def own():
    return DemoModel()


@pytest.fixture(scope="module")
def taught(own, subjects, tmp_path_factory):
    library = Library(tmp_path_factory.mktemp("text") / "library", own.fingerprint(), 4, create=True)
    library.keep_calibration(_calibration(own))
    for name in ("octopus", "penguin"):
        s = subjects[name]
        train_concept(own, library, s.images, name, s.trigger, s.class_noun, s.references.captions, CONFIG)
    return library


def _calibration(own):
    own.adapt_text(True)
    return calibrate(own, (SIZE, SIZE), 48)


def test_prompts_are_encoded_in_the_same_order_whatever_was_met_before():
    """So that the second concept of a recipe is the same file in a process of its own"""
    seen = []

    def encode(prompts):
        seen.append(prompts)
        return Conditioning(torch.tensor([[[float(ord(p))]] for p in prompts]))

    for before in ([], ["d", "b", "c"]):
        live = LivePrompts()
        live.numbered(before, torch.device("cpu"))
        found = live.encoded(live.numbered(["c", "a", "b", "a"], torch.device("cpu")), encode)
        assert [chr(int(x)) for x in found.context.flatten()] == ["c", "a", "b", "a"]
    assert seen == [["a", "b", "c"]] * 2


def test_every_layer_of_the_text_encoder_is_adapted_and_orthogonal_to_earlier_ones(taught):
    first, second = taught.concepts()
    layers = [n for n in second.adapter.layers if is_text(n)]
    assert len(layers) == 12 and all(second.adapter.layers[n].up.any() for n in layers)
    for name in layers:
        assert (first.bases[name].mT @ second.bases[name]).abs().max() < 1e-4


def test_it_acts_through_the_prompt_and_only_where_it_is_attached(own, taught):
    own.adapt_text(True)
    (first, _), live = taught.concepts(), own.encode_prompts(["an octzu animal", "a castle"])
    x, sigma = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.5)
    text = replace(first.adapter, layers={n: d for n, d in first.adapter.scaled(50.0).layers.items() if is_text(n)})
    attachment = Attachment()
    with torch.no_grad(), attached(own.sites(), attachment):
        bare = own.predict(x, sigma, live)
        attachment.set_frozen(text)
        moved = own.predict(x, sigma, live)
    own.adapt_text(False)
    with torch.no_grad():
        encoded = own.predict(x, sigma, own.encode_prompts(["an octzu animal", "a castle"]))
    assert torch.allclose(bare, encoded, atol=1e-5)
    assert (moved - bare).abs().mean() > 1e-3


def test_a_library_is_begun_with_it_or_without(own, taught, subjects):
    s = subjects["fox"]
    with pytest.raises(UserError, match="was begun with the text encoder: train with text_encoder"):
        train_concept(own, taught, s.images, "fox", s.trigger, config=replace(CONFIG, text_encoder=False))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_diffusers_reads_what_is_trained_of_its_text_encoders(kind, subjects, tmp_path):
    from benchmarks.tiny import make_pipeline
    from seqlora_core.unet_model import UNetModel

    model = UNetModel(make_pipeline(kind))
    library = Library(tmp_path / kind, model.fingerprint(), 4, create=True)
    model.adapt_text(True)
    library.keep_calibration(calibrate(model, (model.size, model.size), 4))
    images = torch.rand(2, model.size, model.size, 3, generator=torch.Generator().manual_seed(0))
    concept, _ = train_concept(model, library, images, "toy", "octzu", config=replace(CONFIG, steps=2, learning_rate=0.1))
    attachment, prompts = Attachment(), ["an octzu animal"]
    attachment.set_frozen(concept.adapter)
    with torch.no_grad(), attached(model.sites(), attachment):
        ours = model.live.encoded(model.encode_prompts(prompts), model.read_prompts)
    model.adapt_text(False)
    bare = model.encode_prompts(prompts)
    model.pipeline.load_lora_weights(tmp_path / kind, weight_name="toy.safetensors")
    theirs = model.encode_prompts(prompts)
    assert torch.allclose(ours.context, theirs.context, atol=1e-4)
    assert (bare.context - theirs.context).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_many_prompts_go_through_a_text_encoder_a_few_at_a_time(kind, monkeypatch):
    """It keeps the states of all its layers until it is done: of a thousand at once that would be tens of gigabytes"""
    from benchmarks.tiny import make_pipeline
    from seqlora_core.transformer_model import TransformerModel
    from seqlora_core.unet_model import UNetModel

    model = (TransformerModel if kind == "sd3" else UNetModel)(make_pipeline(kind))
    asked, encode = [], model.pipeline.encode_prompt
    monkeypatch.setattr(
        model.pipeline, "encode_prompt", lambda texts, *a, **k: asked.append(len(texts)) or encode(texts, *a, **k)
    )
    texts = [f"a cat, {n} of them" for n in range(70)]
    found = model.encode_prompts(texts)
    assert asked == [32, 32, 6] and len(found) == 70
    assert torch.allclose(found[torch.tensor([69])].context, model.encode_prompts(texts[69:]).context, atol=1e-5)


def test_a_model_goes_with_its_last_name():
    """Not only when Python's collector comes by"""
    model = DemoModel()
    model.encode_prompts(["a fox"])
    left = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert left() is None
    finally:
        gc.enable()
