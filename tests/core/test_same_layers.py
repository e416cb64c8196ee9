"""Layers that files name differently and that are one: on a model, beside moments, in a stack."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from seqlora_core.adapter import Adapter, LayerDelta, load_adapter, save_adapter
from seqlora_core.cli import main
from seqlora_core.demo_model import DEMO_FOLDER, DEMO_MODEL
from seqlora_core.diffusers_names import as_diffusers
from seqlora_core.errors import UserError
from seqlora_core.lora_moments import keep_moments, see_trigger
from seqlora_core.preview import draw_with
from seqlora_core.same_layers import on_model, one_spelling, under_names, unseen
from seqlora_core.spelling import canonical
from seqlora_core.statistics import Moments

FOX, PENGUIN = (DEMO_FOLDER / "loras" / f"seqlora_demo_{n}.safetensors" for n in ("fox", "penguin"))
QKV = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
MLP = "diffusion_model.joint_blocks.0.x_block.mlp.fc1"
TE = "text_model_encoder_layers_0_self_attn_q_proj"


def layer(seed, out=192, width=192, rank=4):
    g = torch.Generator().manual_seed(seed)
    return LayerDelta(torch.randn(rank, width, generator=g), torch.randn(out, rank, generator=g))


def file(folder, name, **layers):
    """A file of these layers; `__` stands for a dot"""
    save_adapter(folder / f"{name}.safetensors", Adapter({n.replace("__", "."): d for n, d in layers.items()}))
    return folder / f"{name}.safetensors"


def dense(adapter, name):
    return adapter.layers[name].dense()


@pytest.mark.parametrize("stem", ["transformer.transformer_blocks.0.attn.{}", "base_model.model.transformer_blocks.0.attn.{}", "lora_transformer_transformer_blocks_0_attn_{}", "lycoris_transformer_blocks_0_attn_{}"])  # fmt: skip
def test_q_k_and_v_of_diffusers_are_the_rows_of_the_fused_layer(stem):
    parts = [layer(i) for i in range(3)]
    names = [canonical(stem.format(m)) for m in ("to_q", "to_k", "to_v")]
    found = under_names(Adapter(dict(zip(names, parts))))
    assert list(found.layers) == [QKV] and found.layers[QKV].rank == 12
    assert torch.allclose(dense(found, QKV), torch.cat([p.dense() for p in parts]), atol=1e-5)
    less = under_names(Adapter({names[0]: parts[0], names[2]: parts[2]}))
    expected = torch.cat([parts[0].dense(), torch.zeros(192, 192), parts[2].dense()])
    assert torch.allclose(dense(less, QKV), expected, atol=1e-5)


def test_layers_are_written_for_diffusers_and_read_back():
    """Of SD3 and Flux.1, of equal ranks before and after"""
    layers = {"joint_blocks.0.x_block.attn.qkv": (576, 192), "joint_blocks.0.x_block.mlp.fc1": (768, 192),
              "joint_blocks.0.context_block.adaLN_modulation.1": (1152, 192), "joint_blocks.2.context_block.adaLN_modulation.1": (384, 192),
              "final_layer.linear": (64, 192), "final_layer.adaLN_modulation.1": (384, 192)}  # fmt: skip
    flux = {
        "double_blocks.0.txt_attn.qkv": (576, 192),
        "single_blocks.3.linear1": (1344, 192),
        "single_blocks.3.linear2": (192, 960),
        "img_in": (192, 64),
    }
    for family in (layers, flux):
        whole = Adapter({f"diffusion_model.{n}": layer(i, *size) for i, (n, size) in enumerate(family.items())})
        tensors = as_diffusers(whole)
        stems = {k.rpartition(".lora_")[0] for k in tensors}
        split = Adapter({s: LayerDelta(tensors[f"{s}.lora_A.weight"], tensors[f"{s}.lora_B.weight"]) for s in stems})
        again = under_names(split)
        assert again.layers.keys() == whole.layers.keys() and not stems & again.layers.keys()
        for name, delta in whole.layers.items():
            assert again.layers[name].rank == 4 and torch.allclose(dense(again, name), delta.dense(), atol=1e-5)
    three = [layer(i) for i in range(3)]
    fused = under_names(Adapter({f"transformer.transformer_blocks.0.attn.to_{m}": d for m, d in zip("qkv", three)}))
    tensors = as_diffusers(fused)
    assert all(torch.equal(tensors[f"transformer.transformer_blocks.0.attn.to_{m}.lora_A.weight"], d.down) for m, d in zip("qkv", three))  # fmt: skip


def test_whose_blocks_they_are_is_told_by_names_or_not_at_all():
    q = "transformer.transformer_blocks.0.attn.to_q"
    wide = Adapter({q: layer(0, 3072, 3072, 1)})  # Flux.1's double blocks or Qwen-Image's
    assert list(under_names(wide).layers) == [q]
    assert list(under_names(wide, ["diffusion_model.single_blocks.0.linear1"]).layers) == ["diffusion_model.double_blocks.0.img_attn.qkv"]  # fmt: skip
    own = "diffusion_model.transformer_blocks.0.attn.to_q"
    assert list(under_names(wide, [own]).layers) == [own]
    pixart = Adapter({"transformer.transformer_blocks.0.attn1.to_q": layer(0)})
    assert under_names(pixart) is pixart
    unet = Adapter({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": layer(0)})
    assert under_names(unet) is unet
    kohya = Adapter({"lora_unet_joint_blocks_0_x_block_attn_qkv": layer(0, 576)})
    assert list(under_names(kohya).layers) == [QKV]


def test_a_weight_of_another_size_is_told():
    parts = {f"transformer.transformer_blocks.0.attn.to_{m}": layer(0, out) for m, out in (("q", 192), ("k", 190))}
    with pytest.raises(UserError, match="attn.to_k of diffusion_model.joint_blocks.0.x_block.attn.qkv is for a weight of"):
        under_names(Adapter(parts))


def test_what_peft_writes_is_named_as_something_reads_it():
    assert canonical("base_model.model.transformer_blocks.0.attn.to_q") == "transformer.transformer_blocks.0.attn.to_q"
    assert canonical("base_model.model.double_blocks.0.img_attn.qkv") == "diffusion_model.double_blocks.0.img_attn.qkv"
    assert canonical("base_model.model.blocks.0.attn.q") == "base_model.model.blocks.0.attn.q"
    assert canonical("base_model.model.unet.conv_in") == "lora_unet_conv_in"


# --- on a model


def test_the_packs_own_loras_act_on_its_model(model):
    adapter, missing = on_model(load_adapter(FOX), model.sites(), "fox")
    assert not missing and set(adapter.layers) <= {s.name for s in model.sites()}
    with_it, bare = (draw_with(model, a, ["a fox"], (64, 64), 0, steps=1) for a in (adapter, None))
    assert not torch.equal(with_it, bare)


def test_a_lora_of_another_model_is_refused(model, tmp_path, capsys):
    other = file(tmp_path, "other", lora_unet_down_blocks_0_x=layer(0))
    wrong = file(tmp_path, "wrong", **{QKV.replace(".", "__"): layer(0, 570)})
    for command in (["sample", "x", "--output", str(tmp_path / "x.png"), "--adapter"], ["calibrate", "--trigger", "x"]):
        assert main([*command, str(other)]) == 2
        assert "other.safetensors has none of its 1 layers on this model, first lora_unet_down" in capsys.readouterr().err
        assert main([*command, str(wrong)]) == 2
        assert f"wrong.safetensors: {QKV} is for a weight of [570, 192], this model's is [576, 192]" in capsys.readouterr().err


# --- beside moments


def test_what_diffusers_wrote_meets_its_moments(model, tmp_path, capsys):
    files = [shutil.copy(p, tmp_path) for p in (FOX, PENGUIN)]
    one, two, output = *(tmp_path / p.name for p in (FOX, PENGUIN)), tmp_path / "out.safetensors"
    for path in (one, two):
        adapter, _ = on_model(load_adapter(path), model.sites(), path.name)
        keep_moments(path, "0" * 16, see_trigger(model, adapter, "a fox", (64, 64), pictures=1), "a fox")
    assert main(["report", *files, "--mode", "data", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["crosstalk"][0][1] > 0.01 and not any("were not recorded" in line for line in said["advice"])
    assert main(["stack", *files, "--mode", "data", "--output", str(output)]) == 0
    assert "were not recorded" not in capsys.readouterr().out
    extra = Adapter(load_adapter(one).layers | {"lora_te_x": layer(0)})
    save_adapter(one, extra)
    keep_moments(one, "0" * 16, see_trigger(model, None, "a fox", (64, 64), pictures=1), "a fox")
    for command in (["stack", "--output", str(output)], ["report"]):
        assert main([*command, *files, "--mode", "data"]) == 0
        assert "1 layers were not recorded, first lora_te_x" in capsys.readouterr().out
    keep_moments(one, "0" * 16, Moments({"l": torch.eye(3)}), "a fox")
    for command in (["stack", "--output", str(output)], ["report"]):
        assert main([*command, *files, "--mode", "data"]) == 2
        assert "what was recorded with seqlora_demo_fox is of none of its" in capsys.readouterr().err


def test_unseen_layers_are_counted_once():
    a, known = Adapter({"a": layer(0), "b": layer(1)}), Moments({"a": torch.eye(192)})
    assert unseen([a, a], [known, known], ["x", "y"]).startswith("1 layers were not recorded, first b")
    assert unseen([Adapter({"a": layer(0)})], [known], ["x"]) == "" == unseen([Adapter({})], [known], ["x"])


# --- in a stack


def summed(tmp_path, *layers):
    """What `seqlora stack` makes of files of one layer each"""
    files = [tmp_path / f"{i}.safetensors" for i in range(len(layers))]
    for path, (name, delta) in zip(files, layers):
        save_file({f"{name}.lora_A.weight": delta.down, f"{name}.lora_B.weight": delta.up}, path)
    assert main(["stack", *map(str, files), "--output", str(tmp_path / "sum.safetensors")]) == 0
    return load_adapter(tmp_path / "sum.safetensors")


@pytest.mark.parametrize(
    "one, two, name",
    [
        ("transformer.transformer_blocks.0.attn.to_out.0", "lora_transformer_transformer_blocks_0_attn_to_out_0", None),
        ("transformer.transformer_blocks.0.attn.to_out.0", "base_model.model.transformer_blocks.0.attn.to_out.0", None),
        ("transformer.transformer_blocks.0.attn.to_out.0", "lora_unet_joint_blocks_0_x_block_attn_proj", QKV.replace("qkv", "proj")),
        (f"lora_te_{TE}", f"lora_te1_{TE}", f"lora_te_{TE}"),
        (f"lora_te_{TE}", "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj", None),
        ("transformer.blocks.0.x", "diffusion_model.blocks.0.x", "diffusion_model.blocks.0.x"),
        ("lora_unet_down_blocks_0_x", "unet.down_blocks.0.x", "lora_unet_down_blocks_0_x"),
    ],
)  # fmt: skip
def test_two_spellings_of_one_layer_are_summed(tmp_path, one, two, name):
    a, b = layer(0), layer(1)
    found = summed(tmp_path, (one, a), (two, b))
    assert len(found.layers) == 1 and name in (None, *found.layers)
    assert torch.allclose(next(iter(found.layers.values())).dense(), a.dense() + b.dense(), atol=1e-5)


def test_the_first_of_two_text_encoders_keeps_its_number():
    xl = Adapter({f"lora_te1_{TE}": layer(0), f"lora_te2_{TE}": layer(1)})
    others = [Adapter({f"lora_te_{TE}": layer(2)}), Adapter({f"lora_te1_{TE}": layer(3)})]
    seen = [Moments({f"lora_te_{TE}": torch.eye(192)}), None, None]
    spelt, moments = one_spelling([others[0], xl, others[1]], seen)
    assert [list(a.layers) for a in spelt] == [[f"lora_te1_{TE}"], [f"lora_te1_{TE}", f"lora_te2_{TE}"], [f"lora_te1_{TE}"]]
    assert list(moments[0].layers) == [f"lora_te1_{TE}"] and moments[1:] == [None, None]


@pytest.mark.parametrize(
    "one, two",
    [
        ("transformer.layers.0.attention.to_out.0", "diffusion_model.layers.0.attention.out"),
        ("lora_te3_encoder_block_0_x", "text_encoders.t5xxl.transformer.encoder.block.0.x"),
    ],
)
def test_names_that_may_mean_one_layer_are_refused(tmp_path, capsys, one, two):
    files = [file(tmp_path, n, **{s.replace(".", "__"): layer(0)}) for n, s in (("a", one), ("b", two))]
    assert main(["stack", *map(str, files), "--output", str(tmp_path / "o.safetensors")]) == 2
    said = capsys.readouterr().err
    assert f"{one} and {two} may be one layer under two names" in said and "--model" in said


def test_the_model_that_is_given_tells_what_layers_are_called(tmp_path):
    given = file(tmp_path, "a", transformer__transformer_blocks__0__ff__net__0__proj=layer(0, 768))
    for more, name in (([], "transformer.transformer_blocks.0.ff.net.0.proj"), (["--model", str(DEMO_MODEL)], MLP)):
        assert main(["stack", str(given), *more, "--output", str(tmp_path / "o.safetensors")]) == 0
        assert list(load_adapter(tmp_path / "o.safetensors").layers) == [name]


def test_files_that_diffusers_wrote_are_stacked_for_it(tmp_path):
    output = tmp_path / "o.safetensors"
    assert main(["stack", str(FOX), str(PENGUIN), "--diffusers", "--output", str(output)]) == 0
    found, parts = load_adapter(output), [load_adapter(p) for p in (FOX, PENGUIN)]
    assert found.layers.keys() == parts[0].layers.keys()
    assert all(torch.allclose(dense(found, n), dense(parts[0], n) + dense(parts[1], n), atol=1e-5) for n in found.layers)
