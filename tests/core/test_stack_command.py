"""`seqlora stack` and `report` of LoRA files: as the nodes do it."""

import json

import pytest
import torch

from seqlora_core.adapter import Adapter, LayerDelta, load_adapter, save_adapter
from seqlora_core.calibration import Calibration
from seqlora_core.composition import compose
from seqlora_core.lora_moments import general_path, keep_moments
from seqlora_core.statistics import Moments

from .test_cli import run

LAYER = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def files(tmp_path):
    """Writes a LoRA of one layer"""

    def write(name, seed, width=16):
        generator = torch.Generator().manual_seed(seed)
        delta = LayerDelta(torch.randn(2, width, generator=generator), torch.randn(8, 2, generator=generator))
        save_adapter(tmp_path / f"{name}.safetensors", Adapter({LAYER: delta}))
        return tmp_path / f"{name}.safetensors"

    return write


def stacked(capsys, tmp_path, *arguments):
    code, _, err = run(capsys, "stack", *arguments, "--output", tmp_path / "stacked.safetensors")
    assert code == 0, err
    return load_adapter(tmp_path / "stacked.safetensors").layers[LAYER].dense()


def test_norm_control_divides_once(capsys, files, tmp_path):
    """Mode weights divides by the root of their number itself, but in an order"""
    both = files("a", 1), files("b", 2)
    for options, share in ((("weights",), 1), (("weights", "--order", "first"), 0.5**0.5), (("sum",), 0.5**0.5)):
        plain = stacked(capsys, tmp_path, *both, "--mode", *options)
        found = stacked(capsys, tmp_path, *both, "--norm-control", "--mode", *options)
        assert torch.allclose(found, plain * share, atol=1e-5), options


def test_what_has_strength_0_takes_no_part(capsys, files, tmp_path):
    a, b = files("a", 1), files("b", 2)
    for options in (("--mode", "weights"), ("--norm-control",)):
        assert torch.allclose(
            stacked(capsys, tmp_path, a, f"{b}:0", *options), load_adapter(a).layers[LAYER].dense(), atol=1e-5
        )
    code, out, _ = run(capsys, "report", a, f"{b}:0", "--json")
    assert code == 0 and json.loads(out)["names"] == ["a"]
    code, _, err = run(capsys, "stack", f"{a}:0", "--output", tmp_path / "none.safetensors")
    assert code == 2 and "give a strength other than 0" in err


def test_a_stack_names_the_triggers_of_its_files(capsys, files, tmp_path):
    both = files("a", 1), files("b", 2)
    for path, metadata in zip(both, ({"seqlora.trigger": "octzu"}, {"modelspec.trigger_phrase": "ohwx man"})):
        save_adapter(path, Adapter(load_adapter(path).layers, metadata))
    save_adapter(tmp_path / "c.safetensors", Adapter(load_adapter(both[0]).layers, {"seqlora.trigger": "octzu"}))
    stacked(capsys, tmp_path, *both, tmp_path / "c.safetensors")
    assert load_adapter(tmp_path / "stacked.safetensors").triggers == ["octzu", "ohwx man"]


@pytest.mark.parametrize("command", ["stack", "report"])
def test_what_is_read_is_not_written_over(capsys, files, tmp_path, command):
    a, b = files("a", 1), files("b", 2)
    before = b.read_bytes()
    code, _, err = run(capsys, command, a, b, "--output", tmp_path / "." / "b.safetensors")
    assert code == 2 and "b.safetensors is one of the LoRAs themselves: name another file" in err and b.read_bytes() == before


def test_a_file_that_is_named_twice_is_told(capsys, files, tmp_path):
    a = files("a", 1)
    code, _, err = run(capsys, "stack", f"{a}:0.5", f"{a}:0.5", "--output", tmp_path / "x.safetensors")
    assert code == 2 and "is named twice: name it once, with one strength" in err


@pytest.mark.parametrize("command", ["stack", "report"])
def test_who_was_not_calibrated_is_named(capsys, files, tmp_path, command):
    both = files("a", 1), files("b", 2)
    code, _, err = run(capsys, command, *both, "--mode", "data", "--output", tmp_path / "x.safetensors")
    assert code == 2 and "needs to know what a, b sees: run 'python -m seqlora_core calibrate'" in err


@pytest.mark.parametrize("whose", ["the command line's", "the nodes'", "a library's"])
def test_what_the_base_model_sees_is_found(capsys, files, tmp_path, whose):
    both, base = [files("a", 1), files("b", 2)], "0123456789abcdef"
    seen = [Moments({LAYER: torch.linspace(1, last, 16).diag()}) for last in (0.1, 3)]
    for path, moments in zip(both, seen):
        kept = keep_moments(path, base, moments, "ohwx")
        if whose == "a library's":
            kept.rename(path.with_name(f"{path.stem}.stats.safetensors"))
    folder = tmp_path / "seqlora" if whose == "the nodes'" else tmp_path
    place = tmp_path / "calibration.safetensors" if whose == "a library's" else general_path(folder, base)
    general = Moments({LAYER: torch.linspace(5, 0.1, 16).diag()})
    Calibration(general, ["a house"], torch.zeros(1, 4)).save(place, base)
    expected = compose([load_adapter(p) for p in both], mode="data", moments=seen, general=general).layers[LAYER].dense()
    assert torch.allclose(stacked(capsys, tmp_path, *both, "--mode", "data"), expected, atol=1e-5)


@pytest.mark.parametrize("where", ["two libraries", "a library and a folder"])
def test_what_the_base_model_sees_does_not_depend_on_the_order(capsys, files, tmp_path, where):
    both, base = [], "0123456789abcdef"
    for number, name in enumerate(("one", "two")):
        lora, folder = files(f"lora{number}", number + 1), tmp_path / name
        folder.mkdir()
        both.append(lora.rename(folder / lora.name))
        kept = keep_moments(both[-1], base, Moments({LAYER: torch.linspace(1, 3 + number, 16).diag()}), "ohwx")
        library = where == "two libraries" or number
        if library:
            kept.rename(folder / f"lora{number}.stats.safetensors")
        place = folder / "calibration.safetensors" if library else general_path(folder, base)
        general = Moments({LAYER: torch.linspace(5, 0.1, 16).roll(5 * number).diag()})
        Calibration(general, ["a house"], torch.zeros(1, 4)).save(place, base)
    found, swapped = (stacked(capsys, tmp_path, *order, "--mode", "data") for order in (both, both[::-1]))
    assert torch.allclose(found, swapped, atol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "weights"])
@pytest.mark.parametrize("command", ["stack", "report"])
def test_loras_of_different_kinds_of_models_are_told_apart(capsys, files, tmp_path, command, mode):
    old, new = files("old", 1, 768), files("new", 2, 2048)
    code, _, err = run(capsys, command, old, new, "--mode", mode, "--output", tmp_path / "x.safetensors")
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert (
        f"old and new were trained on different kinds of models: layer {LAYER} is [8, 768] in old and [8, 2048] in new" in err
    )
