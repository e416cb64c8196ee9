"""Files that name one layer differently, through the nodes of a real ComfyUI server without a model, as with one."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from seqlora_core.adapter import load_adapter
from seqlora_core.lora_moments import general_path

from .comfy_server import Failed
from .test_stack_files import applied, concept, drawn, folder, pixels, save, stock  # noqa: F401
from .test_training import BASE

Q = "transformer_blocks.0.attn.to_q"
TE = "text_model_encoder_layers_0_self_attn_q_proj"


def put(folder, name, stem, seed, out=192, width=192, **metadata):  # noqa: F811
    g = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, width, generator=g) / width**0.5, 3 * torch.randn(out, 4, generator=g)
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, folder / f"{name}.safetensors", metadata)
    return up @ down


@pytest.mark.parametrize(
    "stems, size",
    [
        ((f"transformer.{Q}", "lora_transformer_" + Q.replace(".", "_")), 192),
        ((f"base_model.model.{Q}", f"transformer.{Q}"), 192),
        ((f"lora_te_{TE}", f"lora_te1_{TE}"), 64),
    ],
    ids=["onetrainer", "peft", "encoder"],
)
def test_a_stack_saved_without_a_model_loses_none_of_two_spellings(server, folder, stems, size):  # noqa: F811
    both = sum(put(folder, f"s{seed}", stem, seed, size, size) for seed, stem in enumerate(stems))
    graph = {"2": concept("s0"), "3": concept("s1", "2")}
    server.run(BASE | graph | save("3", "same_layers", overwrite=True))
    path = server.base / "models" / "loras" / "same_layers.safetensors"
    (delta,) = load_adapter(path).layers.values()
    assert torch.allclose(delta.dense()[:size], both, atol=1e-4) and not delta.dense()[size:].any()
    ours = pixels(server, server.run(stock(path.name))).astype(int)
    assert np.abs(drawn(server, applied(graph, "3")) - ours).max() <= 1


def test_names_that_may_mean_one_layer_are_refused_without_the_model(server, folder):  # noqa: F811
    put(folder, "s0", "transformer.layers.0.attention.to_out.0", 0)
    put(folder, "s1", "diffusion_model.layers.0.attention.out", 1)
    with pytest.raises(Failed, match="may be one layer under two names, which the files do not say: connect the model"):
        server.run(BASE | {"2": concept("s0"), "3": concept("s1", "2")} | save("3", "apart"))


@pytest.mark.parametrize("stem", [f"transformer.{Q}", "lora_unet_joint_blocks_0_x_block_attn_qkv"], ids=["diffusers", "kohya"])
def test_a_report_and_mode_data_need_no_model_to_meet_the_moments(server, model, calibration, folder, stem):  # noqa: F811
    for seed, name in enumerate(("s0", "s1")):
        put(folder, name, stem, seed, 192 if "to_q" in stem else 576, **{"modelspec.trigger_phrase": f"{name}zu thing"})
    calibration.save(general_path(server.base / "models" / "loras" / "seqlora", model.fingerprint()), model.fingerprint())
    inputs = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "loras": "files/s0\nfiles/s1", "triggers": "", "resolution": 64, "pictures": 2, "seed": 0}  # fmt: skip
    graph = {**BASE, "3": {"class_type": "SeqLoRACalibrate", "inputs": inputs}}
    with_model = {"model": ["1", 0], "clip": ["1", 1]}
    for node, more in (("6", {}), ("7", with_model)):
        graph[node] = {"class_type": "SeqLoRAInterferenceReport", "inputs": {"stack": ["3", 0]} | more}
        graph[f"{node}0"] = {"class_type": "PreviewAny", "inputs": {"source": [node, 2]}}
        graph[f"{node}1"] = save("3", f"data{node}", mode="data", overwrite=True, **more)["8"]
    said = server.run(graph)
    without, known = (json.loads(said[f"{node}0"]["text"][0]) for node in "67")
    assert without["mode"] == "data" and known["crosstalk"][0][1] > 0
    assert np.allclose(without["crosstalk"], known["crosstalk"], rtol=1e-3)
    assert np.allclose(without["crosstalk_after"], known["crosstalk_after"], rtol=1e-3)
    files = [load_file(server.base / "models" / "loras" / f"data{node}.safetensors") for node in "67"]
    assert files[0].keys() == files[1].keys()
    own = [load_adapter(server.base / "models" / "loras" / f"data{node}.safetensors").layers for node in "67"]
    assert all(torch.allclose(d.dense(), own[1][n].dense(), atol=1e-4) for n, d in own[0].items())
