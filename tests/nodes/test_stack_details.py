"""Stacks that are out of the ordinary, through the nodes of a real ComfyUI server: other kinds alone, one file twice, off, filtered."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from seqlora_core.adapter import Adapter, LayerDelta, load_adapter, save_adapter
from seqlora_core.selection import selected

from .comfy_server import Failed
from .test_stack_files import PROJ, applied, concept, drawn, folder, pixels, save, stock  # noqa: F401
from .test_training import BASE

LOOK = {"5": {"class_type": "PreviewAny", "inputs": {"source": ["9", 3]}}}


def listed(text):
    return {"2": {"class_type": "SeqLoRALibrary", "inputs": {"library": "", "concepts": text, "strength": 1.0}}}


@pytest.mark.parametrize("mode", ["sum", "weights"])
def test_a_stack_of_nothing_but_other_kinds(server, folder, mode):  # noqa: F811
    said = server.run(applied({"2": concept("loha")}, "2", mode=mode) | LOOK)["5"]["text"][0]
    theirs = pixels(server, server.run(stock("files/loha.safetensors"))).astype(int)
    assert np.abs(drawn(server, applied({"2": concept("loha")}, "2", mode=mode)) - theirs).max() <= 1
    assert "times of its own effect" not in said and "nan" not in said


def test_a_filter_acts_on_other_kinds_too(server, folder):  # noqa: F811
    graph = {"2": concept("one"), "3": concept("loha", "2")}
    outside = applied({"2": concept("one"), "3": concept("loha", "2", layers="attn.proj")}, "3")
    assert np.abs(drawn(server, outside) - drawn(server, applied(graph, "3"))).max() <= 1
    for change in ({"layers": "context_block"}, {}):
        stack = {"2": concept("loha", **change)}
        with pytest.raises(Failed, match="leaves no layer of loha: use words of their names, as in diffusion_model.joint"):
            server.run(applied(stack, "2", **({} if change else {"layers": "context_block"})) | LOOK)


def test_one_lora_twice_for_other_layers_each(server, folder, tmp_path):  # noqa: F811
    """Summed, each part has its own strength; projected, it does not give way to itself"""
    whole = load_adapter(folder / "one.safetensors")
    parts = [selected(whole, "x_block"), selected(whole, "context_block").scaled(0.3)]
    save_adapter(folder / "split.safetensors", Adapter(parts[0].layers | parts[1].layers))
    theirs = pixels(server, server.run(stock("files/split.safetensors"))).astype(int)
    graph = {"2": concept("one", layers="x_block"), "3": concept("one", "2", layers="context_block", strength=0.3)}
    assert np.abs(drawn(server, applied(graph, "3")) - theirs).max() <= 1
    assert np.abs(drawn(server, applied(graph, "3", mode="weights", norm_control=True)) - theirs).max() <= 1
    assert np.abs(drawn(server, applied({"2": concept("one", layers="x_block")}, "2")) - theirs).max() > 3
    report = {
        "7": {"class_type": "SeqLoRAInterferenceReport", "inputs": {"stack": ["4", 0]}},
        "8": {"class_type": "PreviewAny", "inputs": {"source": ["7", 2]}},
    }
    said = json.loads(server.run(BASE | graph | {"4": concept("two", "3")} | report)["8"]["text"][0])
    assert said["names"] == ["one", "two"], "the report sets one LoRA beside itself"


def test_what_is_off_weakens_nothing(server, folder):  # noqa: F811
    alone = drawn(server, applied({"2": concept("one")}, "2", mode="weights"))
    graph = {"2": concept("one"), "3": concept("two", "2", strength=0.0)}
    assert np.abs(drawn(server, applied(graph, "3", mode="weights")) - alone).max() == 0
    off = {"2": concept("one", strength=0.0)}
    assert np.abs(drawn(server, applied(off, "2")) - drawn(server, dict(BASE), "1")).max() == 0


def test_a_stack_saved_without_a_model_joins_two_spellings_of_a_layer(server, folder):  # noqa: F811
    two = load_file(folder / "two.safetensors")
    kohya = {}
    for key, tensor in two.items():
        stem, _, half = key.partition(".lora_") if ".lora_" in key else key.rpartition(".")
        name = "lora_unet_" + stem.removeprefix("diffusion_model.").replace(".", "_")
        kohya[f"{name}.lora_{half}" if ".lora_" in key else f"{name}.{half}"] = tensor
    save_file(kohya, folder / "two_kohya.safetensors")
    graph = {"2": concept("one"), "3": concept("two_kohya", "2")}
    server.run(BASE | graph | save("3", "spellings"))
    ours = pixels(server, server.run(stock("spellings.safetensors"))).astype(int)
    assert np.abs(drawn(server, applied(graph, "3")) - ours).max() <= 1


def test_a_file_cannot_say_when_a_lora_acts(server, folder):  # noqa: F811
    with pytest.raises(Failed, match="one acts on some steps only, which a file cannot say"):
        server.run(BASE | {"2": concept("one", end_percent=0.5)} | save("2", "timed"))


@pytest.mark.parametrize("strength", ["nan", "inf", "1e39"])
def test_a_strength_that_is_no_number_is_told(server, folder, strength):  # noqa: F811
    with pytest.raises(Failed, match="strength"):
        server.run(applied(listed(f"files/one.safetensors: {strength}"), "2") | LOOK)


def test_tensors_of_a_file_that_comfyui_does_not_read_are_told(server, folder):  # noqa: F811
    """PEFT's DoRA, whose magnitudes the stock loader leaves out as well"""
    g = torch.Generator().manual_seed(3)
    dora = {
        f"{PROJ}.lora_A.weight": torch.randn(2, 192, generator=g),
        f"{PROJ}.lora_B.weight": torch.randn(192, 2, generator=g),
    }
    save_file(dora | {f"{PROJ}.lora_magnitude_vector": torch.ones(192)}, folder / "peft_dora.safetensors")
    said = server.run(applied({"2": concept("peft_dora")}, "2") | LOOK)["5"]["text"][0]
    assert "1 tensors have no place in this model" in said and "lora_magnitude_vector" in said


def test_changes_that_stay_unprojected_are_told(server, folder):  # noqa: F811
    g = torch.Generator().manual_seed(4)
    save_file({f"{PROJ}.diff": 0.01 * torch.randn(192, 192, generator=g)}, folder / "full.safetensors")
    graph = {"2": concept("one"), "3": concept("full", "2")}
    said = server.run(applied(graph, "3", mode="weights") | LOOK)["5"]["text"][0]
    unprojected = "full: 1 weights change in more than low rank and are summed unprojected; no figure of the report counts them"
    assert f"{unprojected}, first diffusion_model." in said
    report = {
        "7": {"class_type": "SeqLoRAInterferenceReport", "inputs": {"stack": ["3", 0], "model": ["1", 0], "clip": ["1", 1]}},
        "8": {"class_type": "PreviewAny", "inputs": {"source": ["7", 0]}},
    }
    assert unprojected in server.run(BASE | graph | report)["8"]["text"][0]
    said = server.run(applied(graph, "3") | LOOK)["5"]["text"][0]
    assert "full: 1 weights are no plain low rank; no figure of the report counts them" in said
    graph["4"] = concept("loha", "3")  # which is of low rank: the report has its figures in mode sum too
    report["7"]["inputs"] |= {"stack": ["4", 0], "mode": "sum"}
    said = server.run(BASE | graph | report)["8"]["text"][0]
    assert "full: 1 weights" in said and "loha: 1 weights" not in said


def test_more_ranks_than_a_weight_has_rows_are_added_in_pieces(server, folder):  # noqa: F811
    names = []
    for seed in range(5):
        g = torch.Generator().manual_seed(10 + seed)
        layer = LayerDelta(torch.randn(100, 192, generator=g) / 10, torch.randn(192, 100, generator=g) / 100)
        save_adapter(folder / f"wide{seed}.safetensors", Adapter({PROJ: layer}))
        names.append(f"files/wide{seed}.safetensors")
    theirs = pixels(server, server.run(stock(*names))).astype(int)
    assert np.abs(drawn(server, applied(listed("\n".join(names)), "2")) - theirs).max() <= 1


TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def test_a_file_without_its_text_encoders_part_is_not_written(server, folder):  # noqa: F811
    clip = {f"{TEXT}.lora_down.weight": torch.randn(2, 64), f"{TEXT}.lora_up.weight": torch.randn(64, 2)}
    save_file(load_file(folder / "one.safetensors") | clip, folder / "both.safetensors")
    save_file(clip, folder / "text_alone.safetensors")
    with pytest.raises(Failed, match=f"both changes the text encoder too, first {TEXT}.*: connect the clip"):
        server.run(BASE | {"2": concept("both")} | save("2", "half", model=["1", 0]))
    with pytest.raises(Failed, match="text_alone.safetensors changes text encoders alone, first .*: connect the clip"):
        server.run(BASE | {"2": concept("text_alone")} | save("2", "half", model=["1", 0]))
    server.run(BASE | {"2": concept("both")} | save("2", "with_its_text", model=["1", 0], clip=["1", 1]))
    assert TEXT in load_adapter(server.base / "models" / "loras" / "with_its_text.safetensors").layers


def test_a_file_of_loras_that_look_at_the_weight_says_what_it_is(server, folder):  # noqa: F811
    """ComfyUI gives a DoRA the weight as those before it have left it"""
    for seed, name in enumerate(("dora_a", "dora_b")):
        g = torch.Generator().manual_seed(20 + seed)
        layer = {
            f"{PROJ}.lora_down.weight": torch.randn(2, 192, generator=g),
            f"{PROJ}.lora_up.weight": torch.randn(192, 2, generator=g),
        }
        save_file(layer | {f"{PROJ}.dora_scale": torch.ones(1, 192)}, folder / f"{name}.safetensors")
    graph, linked = {"2": concept("dora_a"), "3": concept("dora_b", "2")}, {"model": ["1", 0], "clip": ["1", 1]}
    said = server.run(BASE | graph | save("3", "doras", **linked))["8"]["text"][0]
    assert "1 weights are changed by several LoRAs that look at the weight first" in said
    assert "several LoRAs" not in server.run(BASE | graph | save("2", "dora", **linked))["8"]["text"][0]


@pytest.mark.parametrize("spelt", ["files/one.safetensors", "files/one", " files/one "])
def test_one_file_is_one_entry_however_it_is_spelt(server, folder, spelt):  # noqa: F811
    listing = {
        "class_type": "SeqLoRALibrary",
        "inputs": {"library": "", "concepts": f"{spelt}: 0.5", "strength": 1.0, "stack": ["2", 0]},
    }
    again = drawn(server, applied({"2": concept("one", strength=0.8), "3": listing}, "3"))
    assert np.abs(again - drawn(server, applied({"2": concept("one", strength=0.5)}, "2"))).max() == 0


def test_nothing_is_listed_that_is_no_lora(server, folder):  # noqa: F811
    (folder / "one.0123456789abcdef.stats.safetensors").write_bytes(b"")
    (server.base / "models" / "loras" / "seqlora" / "some").mkdir(parents=True, exist_ok=True)
    (server.base / "models" / "loras" / "seqlora" / "some" / "calibration.safetensors").write_bytes(b"")
    for name in ("calibration", "general.0123456789abcdef"):  # the second is the command line's, beside what it calibrated
        (folder / f"{name}.safetensors").write_bytes(b"")
    listing = server.get("/object_info/SeqLoRAConcept")["SeqLoRAConcept"]["input"]["optional"]["lora"]
    names = [n.replace("\\", "/") for n in (listing[1].get("options") or listing[0])]
    for path in (
        folder / "one.0123456789abcdef.stats.safetensors",
        server.base / "models/loras/seqlora/some/calibration.safetensors",
        folder / "calibration.safetensors", folder / "general.0123456789abcdef.safetensors",
    ):  # fmt: skip
        path.unlink()
    assert "files/one.safetensors" in names and "files/calibration.safetensors" in names
    assert not [n for n in names if "stats" in n or "general." in n or n == "seqlora/some/calibration.safetensors"]
