"""A saved stack does what Apply Stack does, whatever its LoRAs are; and what gives way to nothing stays as it is."""

import json
from pathlib import Path

import pytest

from .comfy_server import PACK, run_in_comfyui


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, output = tmp_path_factory.mktemp("loras"), tmp_path_factory.mktemp("saved") / "out.json"
    run_in_comfyui(Path(__file__).with_name("saved_in_process.py"), PACK, folder, output)
    return json.loads(output.read_text())


def test_a_saved_stack_is_the_applied_one_for_every_kind_of_change(found):
    """In mode 'weights' too, in which some are projected and others are summed as they are; and where what looks at the weight
    stands behind what changes it"""
    assert len(found["saved"]) == 13 and max(found["saved"].values()) < 1e-4, found["saved"]


def test_the_amount_0_is_the_plain_sum_and_one_lora_alone_is_left_as_it_is(found):
    assert max(found["amount 0"].values()) < 1e-6 and max(found["alone"].values()) < 1e-6


def test_files_that_the_stock_loader_reads_are_read_alike(found):
    """A LoKr of two whole factors whose alpha is endless in half precision, and numbers that no layer has a place for"""
    assert max(found["stock"].values()) < 1e-5


def test_what_never_acts_at_the_same_time_does_not_give_way_and_is_not_divided(found):
    assert found["in turns"] < 1e-5


def test_what_looks_at_the_weight_sees_it_as_it_was_or_is_told(found):
    away, told, beside = found["in own steps"]
    sentence = "dora: 1 weights, which it looks at first as DoRA does, have been changed by others when its steps come"
    assert away < 1e-5 and sentence not in told and sentence in beside


def test_the_part_of_the_model_alone_is_saved_without_a_clip(found):
    assert found["without text"] < 1e-5


def test_changes_of_biases_alone_are_saved(found):
    assert found["bias saved"] < 1e-6


def test_norm_control_divides_what_is_not_projected_too(found):
    assert found["norm control"] == pytest.approx({"sum": 0.5, "weights": 0.5}, rel=1e-4)


def test_a_weight_that_a_control_lora_has_padded_is_changed_in_its_own_columns(found):
    assert found["in a padded weight"] < 1e-6
