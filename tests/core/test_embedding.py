"""A learnt trigger written as an embedding says what the trigger says with its LoRA loaded: read by the real diffusers."""

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import tiny
from seqlora_core import cli
from seqlora_core.adapter import Adapter, LayerDelta, save_adapter
from seqlora_core.attach import Attachment, attached
from seqlora_core.embedding import trigger_embedding
from seqlora_core.errors import UserError
from seqlora_core.unet_model import UNetModel

TRIGGER, SENTENCE = "octzu vekima", "a photo of {} animal, red background"


def learnt(model):
    """As if every second token of the trigger had been learnt"""
    layers, generator = {}, torch.Generator().manual_seed(0)
    for site in model.token_tables():
        ids = model.pipeline.tokenizer(TRIGGER).input_ids[1:-1][1::2]  # its last is the word "a"
        up = torch.zeros(site.out_features, len(ids))
        up[ids, range(len(ids))] = 1.0
        layers[site.name] = LayerDelta(torch.randn(len(ids), site.in_features, generator=generator), up)
    return Adapter(layers, {"seqlora.trigger": TRIGGER})


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_diffusers_reads_it_as_textual_inversion(kind, tmp_path):
    model = UNetModel(tiny.make_pipeline(kind))
    adapter, attachment, pipeline = learnt(model), Attachment(), model.pipeline
    model.adapt_text(False, tokens=True)
    attachment.set_frozen(adapter)
    with torch.no_grad(), attached(model.sites(), attachment):
        wanted = model.read_prompts([SENTENCE.format(TRIGGER)])
    save_adapter(tmp_path / "lora.safetensors", adapter)
    pipeline.save_pretrained(tmp_path / "model")
    arguments = [
        "embedding",
        tmp_path / "lora.safetensors",
        "--model",
        tmp_path / "model",
        "--output",
        tmp_path / "octo.safetensors",
    ]
    assert cli.main([str(a) for a in arguments]) == 0
    vectors = load_file(tmp_path / "octo.safetensors")
    encoders = {"clip_l": (pipeline.text_encoder, pipeline.tokenizer)}
    if kind == "sdxl":
        encoders["clip_g"] = pipeline.text_encoder_2, pipeline.tokenizer_2
    assert set(vectors) == set(encoders)
    for name, (encoder, tokenizer) in encoders.items():
        pipeline.load_textual_inversion({"<octo>": vectors[name]}, token="<octo>", text_encoder=encoder, tokenizer=tokenizer)
    given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    said = pipeline.encode_prompt(SENTENCE.format("<octo>"), **given)
    assert torch.allclose(said[0], wanted.context, atol=1e-5)
    assert kind == "sd15" or torch.allclose(said[2], wanted.pooled, atol=1e-5)
    assert not torch.allclose(model.read_prompts([SENTENCE.format(TRIGGER)]).context, wanted.context, atol=1e-2)


def test_what_cannot_be_written_is_told(model, tmp_path, capsys):
    width = model.text.config.hidden_size
    plain = Adapter({"a": LayerDelta(torch.ones(1, 4), torch.ones(4, 1))})
    with pytest.raises(UserError, match="no trigger that was learnt"):
        trigger_embedding(model, plain, "octzu")
    table = model.token_tables()[0].name
    for name, size in ((table, width + 1), (table.replace("clip_l", "clip_g"), width)):
        other = Adapter({name: LayerDelta(torch.ones(1, size), torch.ones(model.text.config.vocab_size, 1))})
        with pytest.raises(UserError, match="on another text encoder"):
            trigger_embedding(model, other, "octzu")
    save_adapter(tmp_path / "two.safetensors", Adapter(plain.layers, {"seqlora.trigger": "one, two"}))
    given = ["embedding", str(tmp_path / "two.safetensors"), "--output", str(tmp_path / "x.safetensors")]
    assert cli.main(given) == 2 and "names 2 triggers: give the file of one concept" in capsys.readouterr().err
    one = {"seqlora.name": "one", "seqlora.trigger": "one, two"}  # a concept's file, whose trigger has a comma
    save_adapter(tmp_path / "two.safetensors", Adapter(plain.layers, one))
    assert cli.main(given) == 2 and "no trigger that was learnt" in capsys.readouterr().err
