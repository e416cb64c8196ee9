"""Anyone's LoRAs inside a real ComfyUI server: calibrate, stack by data, draw; the report; errors."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from seqlora_core.adapter import Adapter, LayerDelta, concatenate, load_adapter, save_adapter
from seqlora_core.composition import closed_form
from seqlora_core.config import TrainingConfig
from seqlora_core.demo import load_subject
from seqlora_core.library import Library
from seqlora_core.lora_moments import general_path, kept_general, see_trigger
from seqlora_core.prompts import trigger_prompts
from seqlora_core.statistics import moments_from_tensors, read_statistics
from seqlora_core.teach import train_concept

from .comfy_server import Failed
from .lora_files import text_files
from .test_stack_files import save
from .test_training import BASE, draw, pixels

TRIGGERS = {"one": "octzu animal", "two": "pengvo animal"}
MLP = "lora_unet_joint_blocks_0_x_block_mlp_fc1"  # kohya's spelling, and no place of our own concepts


@pytest.fixture(scope="module")
def loras(server, model, calibration):
    """Two LoRAs as files: attention in one spelling, a feed-forward layer in another; the second names its trigger."""
    folder = server.base / "models" / "loras" / "theirs"
    for seed, name in enumerate(TRIGGERS):
        g = torch.Generator().manual_seed(seed)
        sites = [(s.name, s.in_features, s.out_features) for s in model.sites()[:4]] + [(MLP, 192, 768)]
        layers = {n: LayerDelta(torch.randn(2, i, generator=g), 0.05 * torch.randn(o, 2, generator=g)) for n, i, o in sites}
        metadata = {"modelspec.trigger_phrase": TRIGGERS[name]} if name == "two" else {}
        save_adapter(folder / f"{name}.safetensors", Adapter(layers, metadata))
    g = torch.Generator().manual_seed(9)
    wide = {MLP.replace("fc1", "fc2"): LayerDelta(torch.randn(2, 768, generator=g), 0.05 * torch.randn(192, 2, generator=g))}
    save_adapter(folder / "wide.safetensors", Adapter(wide))
    # as if an earlier calibration had drawn its general pictures; the feed-forward layer is not in it yet
    calibration.save(general_path(server.base / "models" / "loras" / "seqlora", model.fingerprint()), model.fingerprint())
    return folder


def calibrate(loras="theirs/one: 0.8\ntheirs/two.safetensors", triggers="one: octzu animal", **change):
    inputs = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "loras": loras, "triggers": triggers, "resolution": 64, "pictures": 4, "seed": 0}  # fmt: skip
    return {**BASE, "3": {"class_type": "SeqLoRACalibrate", "inputs": inputs | change}}


def apply(mode, stack=("3", 0)):
    inputs = {"model": ["1", 0], "clip": ["1", 1], "stack": list(stack), "mode": mode, "amount": 1.0}
    return {"5": {"class_type": "SeqLoRAApplyStack", "inputs": inputs}}


def test_calibrate_then_stack_by_data_then_draw(server, model, loras):
    outputs = server.run(draw(calibrate() | apply("data"), ["5", 0], ["5", 1], "an octzu animal"))
    assert "drew 'octzu animal'" in outputs["3"]["text"][0] and "drew 'pengvo animal'" in outputs["3"]["text"][0]
    by_data = pixels(server, outputs)
    summed = pixels(server, server.run(draw(calibrate() | apply("sum"), ["5", 0], ["5", 1], "an octzu animal")))
    assert np.abs(by_data.astype(int) - summed).max() > 10
    again = server.run(calibrate("theirs/one: 0.7\ntheirs/two.safetensors"))
    assert again["3"]["text"][0].count("was recorded before") == 2
    general = load_file(general_path(server.base / "models" / "loras" / "seqlora", model.fingerprint()))
    assert "moment.diffusion_model.joint_blocks.0.x_block.mlp.fc1" in general  # the one name of the weight
    assert "lora key not loaded" not in server.log_path.read_text()


def test_moments_are_found_while_a_patched_model_is_loaded(server, loras):
    """Files named by Concept nodes, no Calibrate in the graph: the second prompt finds the first one's patches in the weights"""
    server.run(calibrate())

    def stacked(strength):
        two = {"library": "", "name": "", "strength": 1.0, "lora": "theirs/two.safetensors"}
        one = {"library": "", "name": "", "strength": strength, "lora": "theirs/one.safetensors", "stack": ["2", 0]}
        graph = {n: {"class_type": "SeqLoRAConcept", "inputs": i} for n, i in (("2", two), ("3", one))}
        return pixels(server, server.run(draw({**BASE, **graph} | apply("data"), ["5", 0], ["5", 1], "an octzu animal")))

    assert np.abs(stacked(0.8).astype(int) - stacked(0.7)).max() > 0


def test_a_trigger_that_was_wrong_is_given_anew_and_told(server, loras):
    words = "one: pengvo thing\ntwo: pengvo animal"
    assert "theirs/one: drew 'pengvo thing'" in server.run(calibrate(triggers=words))["3"]["text"][0]
    graph = calibrate(triggers=words) | {"6": {"class_type": "SeqLoRAInterferenceReport", "inputs": {"stack": ["3", 0]}}}
    graph["7"] = {"class_type": "PreviewAny", "inputs": {"source": ["6", 0]}}
    assert "one and two share the trigger 'pengvo'" in server.run(graph)["7"]["text"][0]
    assert "drew 'octzu animal'" in server.run(calibrate())["3"]["text"][0]


def test_the_node_records_what_the_core_records(server, model, loras):
    """Two hosts: the same prompts and seeds, other samplers and other noise levels, so alike but not equal.  A LoRA that
    both can adapt: attention only."""
    adapter = load_adapter(loras / "one.safetensors")
    del adapter.layers[MLP]
    save_adapter(loras / "attention.safetensors", adapter.scaled(0.3))
    server.run(calibrate("theirs/attention", TRIGGERS["one"]))
    found = moments_from_tensors(load_file(loras / f"attention.{model.fingerprint()}.stats.safetensors"), {})
    own = see_trigger(model, adapter.scaled(0.3), TRIGGERS["one"], (64, 64), pictures=4)
    for name in list(adapter.layers)[:2]:
        a, b = found[name].flatten(), own[name].flatten()
        assert torch.cosine_similarity(a, b, 0) > 0.8 and 0.7 < a.norm() / b.norm() < 1.4


def test_the_report_node_compares_with_the_projection(server, loras):
    graph = calibrate() | {"6": {"class_type": "SeqLoRAInterferenceReport", "inputs": {"stack": ["3", 0]}}}
    outputs = server.run(graph)
    picture = Image.open(io.BytesIO(server.picture(outputs["6"]["images"][0])))
    assert picture.size[0] == 840 and np.asarray(picture.convert("L")).std() > 10
    graph["7"] = {"class_type": "PreviewAny", "inputs": {"source": ["6", 2]}}
    data = json.loads(server.run(graph)["7"]["text"][0])
    assert data["names"] == ["one", "two"] and data["mode"] == "data"
    assert data["crosstalk"][0][0] == pytest.approx(0.64) and data["crosstalk_after"][1][0] < data["crosstalk"][1][0]
    assert min(data["energy_kept"]) > 0 and max(data["energy_kept"]) < 1 + 1e-6


def test_a_stack_of_a_library_and_a_file(server, model, calibration, loras):
    library = Library(server.base / "models" / "loras" / "seqlora" / "mixed", model.fingerprint(), create=True)
    library.keep_calibration(calibration)
    s = load_subject(model, "octopus")
    train_concept(model, library, s.images, "octopus", "octzu", "animal", s.references.captions, TrainingConfig(steps=2))
    stack = {"4": {"class_type": "SeqLoRACalibrate", "inputs": calibrate("theirs/two", "")["3"]["inputs"] | {"stack": ["2", 0]}},
             "2": {"class_type": "SeqLoRALibrary", "inputs": {"library": "mixed", "concepts": "", "strength": 1.0}}}  # fmt: skip
    outputs = server.run(
        {**BASE, **stack, **apply("data", ("4", 0)), "8": {"class_type": "PreviewAny", "inputs": {"source": ["5", 2]}}}
    )
    assert outputs["8"]["text"][0] == "octzu animal, pengvo animal"
    # another LoRA's layers joined: what this one sees there is recorded too
    assert "theirs/two: drew" in server.run(calibrate("theirs/two\ntheirs/wide", "wide: ohwx"))["3"]["text"][0]
    assert "theirs/two: was recorded before" in server.run(calibrate("theirs/two", ""))["3"]["text"][0]


def test_text_encoders_and_convolutions_are_recorded_and_projected(server, model, loras):
    """A text encoder's LoRA by peft and diffusers, a convolution's by lycoris, as those libraries write them"""
    lycoris = pytest.importorskip("lycoris.modules.locon", reason="no lycoris-lora: pip install -r requirements-dev.txt")
    text_files(loras)
    torch.manual_seed(4)
    module = lycoris.LoConModule("l", torch.nn.Conv2d(16, 192, 2, 2), 1.0, lora_dim=4, alpha=4)
    torch.nn.init.normal_(module.lora_up.weight, std=0.01)
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    conv = {f"lora_unet_x_embedder_proj.{k}": module.state_dict()[k].clone().contiguous() for k in parts}
    # with a layer of the text encoder that the first one has too
    first = load_file(loras / "text_kohya.safetensors")
    conv |= {k: v.flip(0).contiguous() for k, v in first.items() if "layers_0_self_attn_q_proj" in k}
    save_file(conv, loras / "conv.safetensors")
    both, calls = "theirs/text_kohya\ntheirs/conv", "text_kohya: octzu animal\nconv: pengvo animal"
    server.run(calibrate(both, calls))
    base, query = model.fingerprint(), "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    files = {n: read_statistics(loras / f"{n}.{base}.stats.safetensors")[0] for n in ("text_kohya", "conv")}
    for stem in {k.rpartition(".lora_")[0] for k in first} | {"diffusion_model.x_embedder.proj"}:
        assert all(stem in found.layers for found in files.values())
    assert files["conv"]["diffusion_model.x_embedder.proj"].shape == (16, 16)
    # what the first layer sees no LoRA has touched: transformers' own encoder sees the same
    seen, layer = [], next(m for n, m in model.text.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    handle = layer.register_forward_hook(lambda _, args, out: seen.append(args[0].flatten(0, 1)))
    model.encode_prompts(trigger_prompts("octzu animal", 4, 0))
    handle.remove()
    x = torch.cat(seen)
    wanted = x.mT @ x / len(x)
    assert (files["text_kohya"][query] - wanted).norm() < 2e-2 * wanted.norm()

    server.run(calibrate(both, calls) | save("3", "projected", mode="data", overwrite=True, model=["1", 0], clip=["1", 1]))
    found = load_adapter(server.base / "models" / "loras" / "projected.safetensors")
    general = kept_general(server.base / "models" / "loras" / "seqlora", base)
    conv_name = "diffusion_model.x_embedder.proj"
    adapters = [load_adapter(loras / f"{n}.safetensors") for n in files]
    adapters = [Adapter({conv_name if "x_embedder" in n else n: d for n, d in a.layers.items()}) for a in adapters]
    own = concatenate(closed_form(adapters, list(files.values()), general))
    for name in (query, conv_name):
        assert torch.allclose(found.layers[name].dense(), own.layers[name].dense(), atol=1e-5)
        assert (own.layers[name].dense() - concatenate(adapters).layers[name].dense()).norm() > 0.01 * own.layers[
            name
        ].dense().norm()


BAD = [
    (dict(loras=""), "no LoRA to calibrate"),
    (dict(loras="theirs/three"), "no LoRA 'theirs/three'"),
    (dict(loras="../../../etc/passwd"), "no LoRA"),
    (dict(loras="theirs/one: much"), "no number after the colon"),
    (dict(loras="theirs/silent", triggers=""), "theirs/silent does not say what calls it"),
    (dict(triggers="thre: ohwx"), "a trigger is given for 'thre'"),
    (dict(loras="theirs/foreign", triggers="ohwx"), "does not fit this model"),
    (dict(resolution=5), "smaller than min"),
    (dict(resolution=512), "512 x 512 pixels do not fit this model: choose sides of at most 256"),
]


@pytest.mark.parametrize("change, message", BAD, ids=lambda v: str(v)[:30])
def test_bad_input_gets_one_clear_sentence(server, loras, change, message):
    foreign = Adapter({"lora_unet_nowhere": LayerDelta(torch.ones(1, 4), torch.ones(4, 1))})
    save_adapter(loras / "foreign.safetensors", foreign)
    silent = load_adapter(loras / "one.safetensors").scaled(0.9)  # whose trigger was never given
    save_adapter(loras / "silent.safetensors", Adapter(silent.layers))
    with pytest.raises(Failed, match=message):
        server.run(calibrate(**change))


def test_a_failed_run_leaves_no_model_that_comfyui_takes_for_leaked(server, loras):
    with pytest.raises(Failed, match="do not fit"):
        server.run(calibrate(resolution=512))
    server.run(draw(calibrate(), ["1", 0], ["1", 1], "a failed run's next"))
    assert "memory leak" not in server.log_path.read_text()


def test_a_lora_that_changed_is_recorded_again(server, loras):
    server.run(calibrate())
    path = loras / "two.safetensors"
    adapter = load_adapter(path)
    save_adapter(path, adapter.scaled(1.5))
    text = server.run(calibrate())["3"]["text"][0]
    assert "two: drew" in text and "one: was recorded before" in text
