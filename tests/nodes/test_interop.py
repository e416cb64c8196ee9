"""LoRAs to and from other nodes: LORA_STACK tuples of other packs, LORA_MODEL of ComfyUI's own Train LoRA."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from .comfy_server import Failed
from .test_training import BASE, draw, pixels

FOX, PENGUIN = "seqlora_demo_fox.safetensors", "seqlora_demo_penguin.safetensors"
CLIP_LAYER = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture(scope="module")
def both(server):
    """A LoRA of the model and the text encoder; its name"""
    tensors = load_file(next(server.base.rglob(FOX)))
    g = torch.Generator().manual_seed(0)
    tensors[f"{CLIP_LAYER}.lora_down.weight"] = torch.randn(2, 64, generator=g)
    tensors[f"{CLIP_LAYER}.lora_up.weight"] = 0.3 * torch.randn(256, 2, generator=g)
    save_file(tensors, server.base / "models" / "loras" / "both.safetensors")
    return "both.safetensors"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def stacker(text):
    return {**BASE, "2": node("TheirStacker", text=text)}


def applied(stack, mode="sum"):
    return {"5": node("SeqLoRAApplyStack", model=["1", 0], clip=["1", 1], stack=stack, mode=mode, amount=1.0)}


def picture(server, graph):
    return pixels(server, server.run(draw(graph, ["5", 0], ["5", 1], "a foxqi animal"))).astype(int)


def assert_same(a, b):
    assert np.abs(a - b).max() <= 2, np.abs(a - b).max()  # one patch or several: rounding


def test_their_stack_draws_as_through_their_loader(server, both):
    """Model and clip strengths apart, a name without folder, a LoRA that is off"""
    graph = stacker(f"{both} 0.8 -0.5\n{PENGUIN} 0.3 0.3\n{FOX} 0 0")
    theirs = picture(server, graph | {"5": node("TheirLoader", model=["1", 0], clip=["1", 1], lora_stack=["2", 0])})
    ours = graph | {"3": node("SeqLoRAFromLoraStack", lora_stack=["2", 0])} | applied(["3", 0])
    assert_same(picture(server, ours), theirs)
    for text in (f"{both} 0.8 0\n{PENGUIN} 0.3 0.3", f"{both} 0 -0.5\n{PENGUIN} 0.3 0.3"):
        assert np.abs(picture(server, ours | stacker(text)) - theirs).max() > 10, text


def test_a_lora_that_is_in_their_stack_twice_adds_up(server, both):
    graph = stacker(f"{both} 0.5 0.2\n{PENGUIN} 0.3 0.3\n{both} 0.4 0.4\n{PENGUIN} -0.3 -0.3")
    theirs = picture(server, graph | {"5": node("TheirLoader", model=["1", 0], clip=["1", 1], lora_stack=["2", 0])})
    assert_same(picture(server, graph | {"3": node("SeqLoRAFromLoraStack", lora_stack=["2", 0])} | applied(["3", 0])), theirs)


def test_our_stack_draws_the_same_through_their_loader(server, both):
    """A library's concept and files, to LORA_STACK and back"""
    graph = stacker(f"{both} 0.8 -0.5") | {
        "3": node("SeqLoRAFromLoraStack", lora_stack=["2", 0]),
        "4": node("SeqLoRAConcept", library="", name="", strength=0.4, lora=PENGUIN, stack=["3", 0]),
        "6": node("SeqLoRAToLoraStack", stack=["4", 0]),
        "7": node("PreviewAny", source=["6", 0]),
    }
    outputs = server.run(graph | {"5": node("TheirLoader", model=["1", 0], clip=["1", 1], lora_stack=["6", 0])})
    assert json.loads(outputs["7"]["text"][0]) == [[both, 0.8, -0.5], [PENGUIN, 0.4, 0.4]]
    theirs = picture(server, graph | {"5": node("TheirLoader", model=["1", 0], clip=["1", 1], lora_stack=["6", 0])})
    assert_same(picture(server, graph | applied(["4", 0])), theirs)


def test_a_lora_of_two_strengths_is_calibrated_once_and_whole(server, both):
    calibrate = node(
        "SeqLoRACalibrate", model=["1", 0], clip=["1", 1], vae=["1", 2], loras="", triggers="both: foxqi animal", resolution=64,
        pictures=4, seed=0, stack=["3", 0],
    )  # fmt: skip
    graph = stacker(f"{both} 0.8 -0.5") | {"3": node("SeqLoRAFromLoraStack", lora_stack=["2", 0]), "4": calibrate}
    outputs = server.run(draw(graph | applied(["4", 0], "data"), ["5", 0], ["5", 1], "a foxqi animal"))
    assert outputs["4"]["text"] == ["both: drew 'foxqi animal'"]
    alone = picture(server, graph | {"5": node("TheirLoader", model=["1", 0], clip=["1", 1], lora_stack=["2", 0])})
    assert_same(picture(server, graph | applied(["4", 0])), alone)


def filled(server, kind, **given):
    """A stock node, the inputs that only some versions of it have at their defaults"""
    inputs = {}
    for name, (values, *options) in server.info[kind]["input"]["required"].items():
        options = options[0] if options else {}
        inputs[name] = given.get(name, options.get("default", values[0] if isinstance(values, list) else None))
    return node(kind, **inputs)


def test_what_train_lora_trains_joins_a_stack(server):
    """The same picture as through ComfyUI's own loader; kept as a file once"""
    if "TrainLoraNode" not in server.info:
        pytest.skip("this ComfyUI has no Train LoRA")
    given = {
        "model": ["1", 0], "latents": ["2", 0], "positive": ["3", 0], "steps": 4, "learning_rate": 0.01, "rank": 4,
        "training_dtype": "fp32", "lora_dtype": "fp32",
    }  # fmt: skip
    place = [i for i, kind in enumerate(server.info["TrainLoraNode"]["output"]) if kind == "LORA_MODEL"][0]
    graph = BASE | {
        "2": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "3": node("CLIPTextEncode", clip=["1", 1], text="a fox"),
        "4": filled(server, "TrainLoraNode", **given),
        "6": node("SeqLoRAFromLoraStack", lora_model=["4", place], name="native", strength=0.7),
    }
    # Train LoRA draws other noise each time: both ways in one graph
    loader = filled(server, "LoraModelLoader", model=["1", 0], lora=["4", place], strength_model=0.7)
    graph |= {"7": loader} | applied(["6", 0])
    graph = draw(draw(graph, ["7", 0], ["1", 1], "a fox", 20), ["5", 0], ["5", 1], "a fox", 30)
    graph = draw(graph, ["1", 0], ["1", 1], "a fox", 40)
    outputs = server.run(graph)
    native, ours, bare = (pixels(server, outputs, n).astype(int) for n in ("25", "35", "45"))
    assert np.abs(native - bare).max() > 10
    assert_same(ours, native)
    files = list((server.base / "models" / "loras").glob("native_*.safetensors"))
    assert len(files) == 1
    graph["5"]["inputs"]["mode"] = "weights"  # the training is kept
    graph["6"]["inputs"]["strength"] = 0.6
    server.run(graph)
    assert list((server.base / "models" / "loras").glob("native_*.safetensors")) == files


BAD = [
    (node("SeqLoRAFromLoraStack"), "nothing to take"),
    (node("SeqLoRAFromLoraStack", lora_stack=["2", 0]), "no LoRA 'nowhere'"),
    (node("SeqLoRAToLoraStack", stack=["8", 0]), "acts on some layers or steps only"),
]


@pytest.mark.parametrize("bad, message", BAD, ids=lambda v: str(v)[:40])
def test_bad_input_gets_one_clear_sentence(server, bad, message):
    half = node("SeqLoRAConcept", library="", name="", strength=1.0, lora=FOX, end_percent=0.5)
    with pytest.raises(Failed, match=message):
        server.run(stacker("nowhere 1 1") | {"8": half, "3": bad, "4": node("PreviewAny", source=["3", 0])})
    short = stacker(f"{FOX} 1") | {"3": node("SeqLoRAFromLoraStack", lora_stack=["2", 0])}
    with pytest.raises(Failed, match="a file, a model strength and a clip strength"):
        server.run(short | {"4": node("PreviewAny", source=["3", 0])})
