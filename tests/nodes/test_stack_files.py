"""Anyone's LoRA files through the nodes of a real ComfyUI server: applied, scheduled, filtered, saved, baked."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from seqlora_core.adapter import Adapter, LayerDelta, load_adapter, save_adapter
from seqlora_core.demo_model import DEMO_MODEL
from seqlora_core.spectrum import capped

from .comfy_server import Failed
from .test_training import BASE, draw, pixels

CLIP_LAYER = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
PROJ = "diffusion_model.joint_blocks.0.x_block.attn.proj"


@pytest.fixture(scope="module")
def folder(server, model):
    """Two plain LoRAs of all attention layers, and a LoHa of one"""
    folder = server.base / "models" / "loras" / "files"
    for seed, name in enumerate(("one", "two")):
        g = torch.Generator().manual_seed(seed)
        layers = {
            s.name: LayerDelta(torch.randn(2, s.in_features, generator=g), 0.05 * torch.randn(s.out_features, 2, generator=g))
            for s in model.sites()
        }
        save_adapter(folder / f"{name}.safetensors", Adapter(layers, {"modelspec.trigger_phrase": f"{name}zu thing"}))
    site = next(s for s in model.sites() if s.name == PROJ)
    sides = (("a", (site.out_features, 2)), ("b", (2, site.in_features)))
    hada = {f"{PROJ}.hada_w{i}_{s}": 0.4 * torch.randn(*shape, generator=g) for i in (1, 2) for s, shape in sides}
    save_file(hada, folder / "loha.safetensors")
    return folder


def concept(name, stack=None, **change):
    inputs = {"library": "", "name": "", "strength": 1.0, "lora": f"files/{name}.safetensors"} | change
    return {"class_type": "SeqLoRAConcept", "inputs": inputs | ({"stack": [stack, 0]} if stack else {})}


def applied(graph, stack, **change):
    inputs = {"model": ["1", 0], "clip": ["1", 1], "stack": [stack, 0], "mode": "sum", "amount": 1.0}
    return BASE | graph | {"9": {"class_type": "SeqLoRAApplyStack", "inputs": inputs | change}}


def stock(*names):
    graph, last = dict(BASE), "1"
    for i, name in enumerate(names):
        inputs = {"model": [last, 0], "clip": [last, 1], "lora_name": name, "strength_model": 1.0, "strength_clip": 1.0}
        last = str(50 + i)
        graph[last] = {"class_type": "LoraLoader", "inputs": inputs}
    return draw(graph, [last, 0], [last, 1])


def drawn(server, graph, node="9"):
    return pixels(server, server.run(draw(graph, [node, 0], [node, 1]))).astype(int)


def test_files_of_models_loras_draw_as_the_stock_loaders_do(server, folder):
    names = [f"files/{n}.safetensors" for n in ("one", "two", "loha")]
    theirs = pixels(server, server.run(stock(*names))).astype(int)
    graph = {"2": concept("one"), "3": concept("two", "2"), "4": concept("loha", "3")}
    ours = drawn(server, applied(graph, "4"))
    assert np.abs(ours - theirs).max() <= 1
    listed = {"class_type": "SeqLoRALibrary", "inputs": {"library": "", "concepts": "\n".join(names), "strength": 1.0}}
    assert np.abs(drawn(server, applied({"2": listed}, "2")) - theirs).max() <= 1
    assert np.abs(drawn(server, applied({"2": listed}, "2", strength=0.0)) - theirs).max() > 10


def test_a_schedule_acts_between_its_percents(server, folder):
    always, never = drawn(server, applied({"2": concept("one")}, "2")), drawn(server, dict(BASE), "1")

    def between(start, end):
        return drawn(server, applied({"2": concept("one", start_percent=start, end_percent=end)}, "2"))

    assert np.abs(between(0.0, 0.99) - always).max() <= 1
    assert np.abs(between(0.99, 1.0) - never).max() <= 1
    half = between(0.0, 0.5)
    assert np.abs(half - always).max() > 10 and np.abs(half - never).max() > 10
    with pytest.raises(Failed, match="it would never act"):
        between(0.5, 0.5)


def test_a_schedule_holds_for_the_text_encoder_too(server, folder):
    layer = LayerDelta(torch.ones(1, 64), torch.full((64, 1), 0.5))
    save_adapter(folder / "texts.safetensors", Adapter({CLIP_LAYER: layer}))

    def between(start, end):
        return drawn(server, applied({"2": concept("texts", start_percent=start, end_percent=end)}, "2"))

    always, never = between(0.0, 1.0), drawn(server, dict(BASE), "1")
    assert np.abs(always - never).max() > 10
    assert np.abs(between(0.99, 1.0) - never).max() <= 1 and np.abs(between(0.0, 0.99) - always).max() <= 1


def test_filters_protection_and_projection_are_told(server, folder):
    graph = {"2": concept("one", protected=True, layers="x_block"), "3": concept("two", "2"), "4": concept("loha", "3")}
    look = {"5": {"class_type": "PreviewAny", "inputs": {"source": ["9", 3]}}}
    said = server.run(applied(graph, "4", mode="weights") | look)["5"]["text"][0]
    kept = said.split("keeps, the least first: ")[1].splitlines()[0]
    assert "one 100%" in kept and "two 100%" not in kept
    with pytest.raises(Failed, match="leaves no layer of one"):
        server.run(applied({"2": concept("one", layers="up_blocks")}, "2") | look)
    with pytest.raises(Failed, match="'one' sees: put a Calibrate node before"):
        server.run(applied({"2": concept("one")}, "2", mode="data") | look)


def save(stack, name, **change):
    inputs = {"stack": [stack, 0], "name": name, "mode": "sum", "amount": 1.0, "overwrite": False} | change
    return {"8": {"class_type": "SeqLoRASaveStack", "inputs": inputs}}


def test_a_saved_stack_is_one_plain_lora_for_the_stock_loader(server, folder):
    graph = {"2": concept("one"), "3": concept("two", "2", strength=-0.5), "4": concept("loha", "3")}
    ours = drawn(server, applied(graph, "4"))
    server.run(BASE | graph | save("4", "whole", model=["1", 0], clip=["1", 1]))
    assert np.abs(pixels(server, server.run(stock("whole.safetensors"))).astype(int) - ours).max() <= 1
    whole = load_adapter(server.base / "models" / "loras" / "whole.safetensors")
    assert whole.layers[PROJ].rank == 2 + 2 + 4 and whole.triggers == ["onezu thing", "twozu thing"]
    with pytest.raises(Failed, match="a LoHa, no plain LoRA: only the nodes read it, with the model that it is for connected"):
        server.run(BASE | graph | save("4", "without_model"))
    text = server.run(BASE | graph | save("4", "less", model=["1", 0], clip=["1", 1], rank=3))["8"]["text"][0]
    less = load_adapter(server.base / "models" / "loras" / "less.safetensors")
    share = sum((whole.layers[n].dense() - d.dense()).square().sum() for n, d in less.layers.items())
    share = float(share / sum(d.energy() for d in whole.layers.values()))
    assert max(d.rank for d in less.layers.values()) == 3 and f"{share:.2%} of its energy lost to rank 3" in text
    with pytest.raises(Failed, match="exists in models/loras"):
        server.run(BASE | graph | save("4", "less", model=["1", 0]))
    itself = {"2": concept("one"), "3": concept("one", "2", lora="less.safetensors")}
    with pytest.raises(Failed, match="less.safetensors is one of the LoRAs of the stack: choose another name"):
        server.run(BASE | itself | save("3", "less", overwrite=True))


def test_a_stack_is_baked_into_a_checkpoint_by_comfyuis_own_node(server, folder):
    graph = applied({"2": concept("one"), "3": concept("two", "2", strength=0.5)}, "3")
    inputs = {"model": ["9", 0], "clip": ["9", 1], "vae": ["1", 2], "filename_prefix": "checkpoints/baked"}
    server.run(graph | {"10": {"class_type": "CheckpointSave", "inputs": inputs}})
    baked = load_file(next((server.base / "output" / "checkpoints").glob("baked*.safetensors")))
    base = load_file(DEMO_MODEL)
    one, two = (load_adapter(folder / f"{n}.safetensors").layers[PROJ].dense() for n in ("one", "two"))
    key = f"model.{PROJ}.weight"
    changed = next(v for k, v in baked.items() if k.endswith(f"{PROJ}.weight")).float()
    before = next(v for k, v in base.items() if k.endswith(f"{PROJ}.weight")).float()
    assert key in baked or any(k.endswith(f"{PROJ}.weight") for k in baked)
    step = before.abs().max() * 2**-10  # half precision
    assert (changed - before - one - 0.5 * two).abs().max() <= step and (one + 0.5 * two).abs().max() > 10 * step


def test_a_file_that_is_gone_is_told(server, folder):
    with pytest.raises(Failed, match="not in list|no LoRA"):
        server.run(applied({"2": concept("gone")}, "2") | {"5": {"class_type": "PreviewAny", "inputs": {"source": ["9", 3]}}})


def test_a_spike_is_told_and_cut_where_the_user_asks_for_it(server, folder):
    one = load_adapter(folder / "one.safetensors")
    wild = dict(one.layers)
    wild[PROJ] = replace(wild[PROJ], up=wild[PROJ].up * 500)
    save_adapter(folder / "wild.safetensors", Adapter(wild, {}))
    save_adapter(folder / "tame.safetensors", capped(load_adapter(folder / "wild.safetensors"), 10))
    look = {"5": {"class_type": "PreviewAny", "inputs": {"source": ["9", 3]}}}

    def said(**change):
        return server.run(applied({"2": concept("wild")}, "2", **change) | look)["5"]["text"][0]

    assert "Apply Stack's cap" in said() and "layers cut to" not in said()
    assert f"wild: 1 layers cut to 10 times its middle layer, the worst {PROJ}." in said(cap=10.0)
    with pytest.raises(Failed, match="cap is 0.5: give a number of at least 1"):
        said(cap=0.5)
    cut, tame, whole = (
        drawn(server, applied({"2": concept(name, strength=0.1)}, "2", cap=cap))
        for name, cap in (("wild", 10.0), ("tame", 0.0), ("wild", 0.0))
    )
    assert np.abs(cut - tame).max() <= 1 and np.abs(cut - whole).max() > 10
    server.run(BASE | {"2": concept("wild")} | save("2", "capped", cap=10.0))
    saved, wanted = (
        load_adapter(server.base / "models" / "loras" / "capped.safetensors"),
        load_adapter(folder / "tame.safetensors"),
    )
    assert all(torch.allclose(d.dense(), wanted.layers[n].dense(), rtol=1e-3, atol=1e-4) for n, d in saved.layers.items())


def test_loras_of_unlike_models_are_not_saved_together(server, folder):
    """Without a model nothing else tells them apart"""
    for name, width in (("sd15", 768), ("sdxl", 2048)):
        layer = LayerDelta(torch.ones(1, width), torch.ones(8, 1))
        save_adapter(folder / f"{name}.safetensors", Adapter({"lora_unet_mid_block_attn2_to_k": layer}))
    with pytest.raises(Failed, match="trained on different kinds of models: layer lora_unet_mid_block_attn2_to_k"):
        server.run({"2": concept("sd15"), "3": concept("sdxl", "2")} | save("3", "unlike"))
