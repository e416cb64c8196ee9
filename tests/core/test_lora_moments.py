"""Moments of anyone's LoRA: drawn by itself, kept beside its file, found again, and not trusted when the file changed."""

import json
import os

import pytest
import torch

from seqlora_core.adapter import Adapter, LayerDelta, load_adapter, save_adapter
from seqlora_core.cli import main
from seqlora_core.composition import compose
from seqlora_core.errors import UserError
from seqlora_core.lora_moments import (
    general_calibration,
    general_path,
    keep_moments,
    kept_general,
    kept_moments,
    moments_path,
    see_trigger,
    shared_base,
)
from seqlora_core.statistics import Moments
from seqlora_core.tensor_file import tensors_hash
from seqlora_core.triggers import trigger_of

BASE = "0123456789abcdef"


@pytest.mark.parametrize(
    "metadata, trigger",
    [
        ({"seqlora.trigger": "octzu", "seqlora.class_noun": "animal"}, "octzu animal"),
        ({"modelspec.trigger_phrase": "ohwx man", "ss_tag_frequency": "{}"}, "ohwx man"),
        ({"ss_tag_frequency": json.dumps({"10_a": {"smile": 4, "ohwx man ": 9}, "2_b": {"smile": 3}})}, "ohwx man"),
        ({"ss_dataset_dirs": json.dumps({"10_ohwx man": {"n_repeats": 10}}), "ss_tag_frequency": "{}"}, "ohwx man"),
        ({"ss_tag_frequency": "not json", "ss_dataset_dirs": "[]"}, ""),
        ({}, ""),
    ],
)
def test_trigger_from_metadata(metadata, trigger):
    assert trigger_of(metadata) == trigger


def adapter_of(model, seed=0, layers=None, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    sites = [s for s in model.sites() if layers is None or s.name in layers]
    return Adapter(
        {
            s.name: LayerDelta(
                torch.randn(2, s.in_features, generator=generator), scale * torch.randn(s.out_features, 2, generator=generator)
            )
            for s in sites
        }
    )


def test_moments_are_kept_for_one_lora_and_one_base(tmp_path, model):
    lora = tmp_path / "a.b.safetensors"
    save_adapter(lora, adapter_of(model))
    shared = torch.eye(3)
    moments = Moments({"q": shared, "k": shared, "out": 2 * torch.eye(2)})
    assert kept_moments(lora) is None
    assert keep_moments(lora, BASE, moments, "ohwx") == moments_path(lora, BASE)
    found, base = kept_moments(lora)
    assert base == BASE and found.layers["q"] is found.layers["k"] and torch.equal(found["out"], moments["out"])
    assert kept_moments(lora, BASE) is not None and kept_moments(lora, "f" * 16) is None
    assert kept_moments(lora.with_name("a.safetensors")) is None  # a name that this one only starts with
    whole = moments_path(lora, BASE).read_bytes()
    for damaged in (whole[:-4], whole[:20], b""):  # as good as none, for whatever else is done with the LoRA
        moments_path(lora, BASE).write_bytes(damaged)
        assert kept_moments(lora) is None and kept_moments(lora, BASE) is None
    keep_moments(lora, BASE, Moments({"q": torch.full((3, 3), torch.nan)}), "ohwx")
    assert kept_moments(lora) is None


def test_of_several_base_models_the_one_counts_that_all_have_seen(tmp_path, model):
    both, other = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], "f" * 16
    assert shared_base(both) is None
    for seed, lora in enumerate(both):
        save_adapter(lora, adapter_of(model, seed))
        keep_moments(lora, BASE, Moments({"q": torch.eye(3)}), "ohwx")
    keep_moments(both[0], other, Moments({"q": torch.eye(3)}), "ohwx")  # the newest, of one of them
    os.utime(moments_path(both[0], other), (2e9, 2e9))
    assert shared_base(both) == BASE and shared_base(both[:1]) == other


def test_moments_outlive_new_metadata_but_not_new_weights(tmp_path, model):
    lora, adapter = tmp_path / "a.safetensors", adapter_of(model)
    save_adapter(lora, adapter)
    keep_moments(lora, BASE, Moments({"q": torch.eye(3)}), "ohwx")
    before = tensors_hash(lora)
    save_adapter(lora, Adapter(adapter.layers, {"modelspec.title": "renamed"}))
    assert tensors_hash(lora) == before and kept_moments(lora) is not None
    save_adapter(lora, adapter.scaled(2.0))
    assert kept_moments(lora) is None


def test_a_lora_sees_other_inputs_than_the_bare_model(model):
    adapter = adapter_of(model, scale=0.5)
    own = see_trigger(model, adapter, "ohwx animal", (64, 64), pictures=4)
    bare = see_trigger(model, None, "ohwx animal", (64, 64), pictures=4)
    assert set(own.layers) == {s.name for s in model.sites()}
    late = model.sites()[-1].name
    assert (own[late] - bare[late]).norm() > 0.05 * bare[late].norm()
    assert torch.equal(own[late], see_trigger(model, adapter, "ohwx animal", (64, 64), pictures=4)[late])
    with pytest.raises(UserError, match="no trigger"):
        see_trigger(model, adapter, " ", (64, 64))


def test_general_moments_are_made_once_and_extended_to_new_layers(model, tmp_path):
    first = general_calibration(model, tmp_path, (64, 64), pictures=8)
    path = general_path(tmp_path, model.fingerprint())
    stamp = path.stat().st_mtime_ns
    assert torch.equal(general_calibration(model, tmp_path, (64, 64), pictures=8).latents, first.latents)
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(path.read_bytes()[:-4])
    assert torch.equal(general_calibration(model, tmp_path, (64, 64), pictures=8).latents, first.latents)
    dropped = next(n for n in first.moments.layers if n not in first.moments.shared())
    del first.moments.layers[dropped]
    first.save(path, model.fingerprint())
    assert dropped in general_calibration(model, tmp_path, (64, 64)).moments.layers
    assert dropped in kept_general(tmp_path, model.fingerprint()).layers


def test_text_encoders_act_and_are_recorded_on_the_command_line(model, tmp_path, capsys):
    general_calibration(model, tmp_path, (64, 64), pictures=8)
    model.adapt_text(True)
    text = {s.name: s for s in model.live.sites}
    both = Adapter(adapter_of(model, scale=2.0).layers)  # of the text encoder's layers too
    model.adapt_text(False)
    assert set(text) < set(both.layers)
    alone = Adapter({n: d for n, d in both.layers.items() if n not in text})
    found = []
    for name, adapter in (("both", both), ("alone", alone)):
        path = tmp_path / f"{name}.safetensors"
        save_adapter(path, adapter)
        command = ["calibrate", str(path), "--trigger", "ohwx animal", "--pictures", "4", "--json"]
        assert main(command) == 0 and json.loads(capsys.readouterr().out)["loras"][0]["new"]
        assert main(command) == 0 and not json.loads(capsys.readouterr().out)["loras"][0]["new"]
        found.append(kept_moments(path)[0].layers)
    assert set(text) <= found[0].keys() and not set(text) & found[1].keys()
    assert set(text) <= kept_general(tmp_path, model.fingerprint()).layers.keys()
    reads = "diffusion_model.joint_blocks.0.context_block.attn.qkv"  # the prompt, which the text encoder's part changes
    assert (found[0][reads] - found[1][reads]).norm() > 0.05 * found[1][reads].norm()


def test_calibrate_then_stack_by_data_on_the_command_line(model, tmp_path, capsys):
    files = [tmp_path / f"{n}.safetensors" for n in ("one", "two")]
    for seed, path in enumerate(files):
        save_adapter(path, adapter_of(model, seed))
    general_calibration(model, tmp_path, (64, 64), pictures=8)  # the command's own draws hundreds
    names = [str(p) for p in files]
    assert main(["stack", *names, "--mode", "data", "--output", str(tmp_path / "s.safetensors")]) == 2
    assert main(["calibrate", *names]) == 2
    assert "does not say what calls it" in capsys.readouterr().err
    assert main(["calibrate", *names, "--trigger", "ohwx"]) == 2
    assert "1 triggers for 2 LoRAs" in capsys.readouterr().err
    command = ["calibrate", *names, "--trigger", "ohwx animal", "--trigger", "zwx animal", "--pictures", "4", "--json"]
    assert main(command) == 0 and [d["new"] for d in json.loads(capsys.readouterr().out)["loras"]] == [True, True]
    assert main(command) == 0 and not any(d["new"] for d in json.loads(capsys.readouterr().out)["loras"])
    otherwise = [*command, "--seed", "1"]  # drawn in another way they are recorded anew
    assert main(otherwise) == 0 and all(d["new"] for d in json.loads(capsys.readouterr().out)["loras"])
    assert main(["stack", *names, "--mode", "data", "--output", str(tmp_path / "s.safetensors")]) == 0
    kept = [kept_moments(p)[0] for p in files]
    general = kept_general(tmp_path, model.fingerprint())
    expected = compose([load_adapter(p) for p in files], mode="data", moments=kept, general=general)
    made = load_adapter(tmp_path / "s.safetensors")
    assert all(torch.allclose(made.layers[n].dense(), d.dense(), atol=1e-6) for n, d in expected.layers.items())
    capsys.readouterr()
    picture, data = tmp_path / "r.png", tmp_path / "r.json"
    assert main(["report", f"{names[0]}:0.5", names[1], "--mode", "data", "--output", str(picture), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["names"] == ["one", "two"] and report["crosstalk"][0][0] == pytest.approx(0.25)
    assert report["crosstalk_after"][1][0] < report["crosstalk"][1][0] and picture.stat().st_size > 10_000
    assert main(["report", *names, "--mode", "weights", "--output", str(data)]) == 0
    assert json.loads(data.read_text(encoding="utf-8"))["mode"] == "weights"
    assert main(["report", *names, "--amount", "2"]) == 2
    assert main(["report", names[0], names[0]]) == 2 and "is named twice" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    save_adapter(tmp_path / "other" / "one.safetensors", load_adapter(files[0]))
    assert main(["report", names[0], str(tmp_path / "other" / "one.safetensors")]) == 2
    assert "have the same name" in capsys.readouterr().err
