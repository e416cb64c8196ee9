"""LoRA files of every kind do what the stock loader makes of them; broken ones are told in a sentence."""

import contextlib
import io
import json
import logging
from pathlib import Path

import pytest

from .comfy_server import PACK, run_in_comfyui

PLAIN = ["diffusers", "diffusers_old", "kohya", "kohya_bfloat16", "kohya_float16", "kohya_float8_e4m3fn", "peft", "locon", "locon_tucker"]  # fmt: skip
OTHER = ["loha", "loha_tucker", "lokr", "lokr_full", "dora", "dora_rows", "oft", "boft", "full", "glora", "loha_dora", "lokr_dora", "lokr_both", "peft_loha", "peft_lokr"]  # fmt: skip
SD3 = ["sd3_diffusers", "sd3_onetrainer", "sd3_musubi", "sd3_ai_toolkit", "text_diffusers", "text_kohya", "text_peft"]
WORDS = {
    "truncated": "not a readable safetensors", "header_cut": "not a readable safetensors", "text": "not a readable safetensors",
    "empty": "it is empty", "torch_archive": "can run code", "no_tensors": "none of its 0 tensors", "no_up": "no lora_up",
    "no_down": "no lora_down", "nan": "not finite", "inf": "not finite", "other_size": r"\[48, 32\], this model's is \[32, 32\]",
    "ranks_differ": "do not multiply", "another_model": "does not fit this model", "no_lora": "does not fit this model",
    "half_loha": "incomplete or damaged", "loha_other_size": "another kind of model", "lokr_other_size": "another kind of model",
    "full_other_size": "another kind of model", "loha_ranks": "do not fit one another", "loha_alpha": "do not fit one another", "loha_int8": "is of int8", "set_nan": "not finite",
    "dora_short": "do not fit one another", "dora_alpha": "has alpha nan at rank", "glora_alpha": "do not fit one another", "lokr_ranks": "do not fit one another", "lokr_alpha": "do not fit one another",
    "glora_other_size": "do not fit one another", "oft_oblong": "do not fit one another|another kind of model", "loha_core": "do not fit one another",
    "number": "of rank 0 or of no size", "lokr_line": "incomplete or damaged", "peft_oft": "an OFT of peft, which", "peft_boft": "a BOFT of peft, which",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    pytest.importorskip("lycoris", reason="no lycoris-lora: pip install -r requirements-dev.txt")
    from . import lora_files

    folder = tmp_path_factory.mktemp("files")
    for part in ("good", "sd3", "broken"):
        (folder / part).mkdir()
    logging.disable(logging.INFO)
    with contextlib.redirect_stdout(io.StringIO()):
        lora_files.unet_files(folder / "good")
        lora_files.sd3_files(folder / "sd3")
        lora_files.broken_files(folder / "broken")
    logging.disable(logging.NOTSET)
    output = folder / "found.json"
    run_in_comfyui(Path(__file__).with_name("files_in_process.py"), PACK, folder, output)
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", PLAIN + OTHER + SD3)
def test_our_sum_is_what_the_stock_loader_makes(found, name):
    """Equal to rounding in float32, every weight, all of which the file really changes; and the model is as it was."""
    one = found[name]
    assert one["same_weights"] and one["weights"] >= 1 and one["unknown"] == 0 and one["restored"]
    assert one["difference"] < 1e-6 and one["change"] > 2e-5 and one["read_again"]


def test_a_bias_of_a_layer_without_one_is_left_out_as_the_stock_loader_does(found):
    one = found["no_bias"]
    assert one["unknown"] == 1 and one["patches"] == 1 and one["plain"] == found["kohya"]["plain"]
    assert one["same_weights"] and one["difference"] < 1e-6 and one["restored"]


def test_what_is_plain_and_what_becomes_low_rank(found):
    for name in PLAIN + SD3:
        assert found[name]["patches"] == 0 and found[name]["plain"] == found[name]["weights"]
    for name in OTHER:
        assert found[name]["plain"] == 0 and found[name]["patches"] == found[name]["weights"]
    assert found["loha"]["patches_left"] < 5  # rank 4 x 4 in layers 32 wide and wider
    assert found["full"]["patches_left"] == found["full"]["patches"]  # random full matrices
    assert found["dora"]["patches_left"] == found["dora"]["patches"]  # every column scaled at random


def test_factors_are_taken_at_the_strength_at_which_they_act(found):
    """ComfyUI's OFT applies the strength twice: what it changes at strength 1 is not twice of what it does at 0.5"""
    for case, one in found["factors"].items():
        assert one["difference"] < 1e-5 < one["change"], case


def test_many_files_are_one_patch_a_weight(found):
    assert found["stack_plain"]["per_weight"] == 1 and found["stack_plain"]["stock_per_weight"] == 4
    assert found["stack_plain"]["difference"] < 1e-6 and found["stack_plain"]["same_weights"]
    # a DoRA and a LoHa keep a patch of their own, the two others share one
    assert found["stack"]["per_weight"] == 3 and found["stack"]["difference"] < 1e-6


def test_a_quantised_model_is_patched_as_the_stock_loader_does(found):
    """fp8 weights: within one step of the format, 1/8 of a value, where rounding falls the other way"""
    assert found["stack_on_fp8"]["same_weights"] and found["stack_on_fp8"]["difference"] <= 1 / 8


@pytest.mark.parametrize("name", WORDS)
def test_broken_files_get_one_sentence(found, name):
    import re

    said = found["errors"][name]
    assert said and re.search(WORDS[name], said) and f"{name}.safetensors" in said and "\n" not in said


def test_a_broken_file_is_found_after_a_good_one_of_the_same_keys(found):
    assert found["errors_after_good"] == found["errors"]


def test_broken_files_leave_the_model_untouched(found):
    assert found["untouched"] and set(found["errors"]) == set(WORDS)
