"""A second run takes over what is still true of the first, and no more: records, fingerprints, decomposed weights."""

import json
from pathlib import Path

import pytest

from .comfy_server import PACK, run_in_comfyui


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, output = tmp_path_factory.mktemp("loras"), tmp_path_factory.mktemp("again") / "out.json"
    run_in_comfyui(Path(__file__).with_name("again_in_process.py"), PACK, folder, output)
    return json.loads(output.read_text())


def test_moments_of_another_checkpoint_do_not_count(found):
    """Auto falls back to the weights, nothing is called measured, and what calls the LoRAs is known still"""
    other, here = found["elsewhere"]["elsewhere"], found["elsewhere"]["here"]
    assert other["mode"] == "weights" and "from weights alone" in other["report"]
    assert other["triggers"] == here["triggers"] == "onezu thing, twozu thing"
    assert "mode 'data' needs to know what 'one' sees" in found["elsewhere"]["data"]
    assert here["mode"] == "data" and "from weights alone" not in here["report"]


def test_the_report_on_a_lora_in_pieces_is_that_on_the_whole_and_what_is_off_changes_nothing(found):
    mode, figures = found["in pieces"].pop("whole")
    assert mode == "data" and len(found["in pieces"]) == 3
    for name, said in found["in pieces"].items():
        assert said == [mode, pytest.approx(figures, rel=1e-4)], name


def test_a_concept_of_a_library_is_the_same_chosen_among_all_files(found):
    by_name, among_files = found["chosen"]
    assert by_name == among_files and by_name[0] == "octzu animal, onezu thing" and '"mode": "data"' in by_name[2]


def test_what_the_base_model_sees_is_found_where_the_command_line_keeps_it_too(found):
    assert found["general"] == pytest.approx([1 / 2, 1 / 7, 1 / 52], rel=0.02) and found["any order"]


def test_files_of_one_name_in_two_folders_have_triggers_of_their_own(found):
    wanted = {"A/style.safetensors": "ohwx man", "B\\style.safetensors": "zwx dog", "cat.v1": "kwx cat"}
    assert found["triggers"] == wanted and found["no_folder"] == {"A/cat.v1": "kwx cat"}
    assert "'style', which is A/style and B/style: write each with its folder" in found["unclear"]
    assert "'C/cat.v1', which is not among the LoRAs" in found["other_folder"]


def test_other_pictures_are_recorded_anew(found):
    """Another seed, number or size; a file that does not say how its pictures were drawn counts as it is"""
    drew = ["drew" in said for said in found["records"]["said"]]
    assert drew == [True, False, True, True, True, False]


def test_a_record_that_is_gone_changes_the_fingerprints(found):
    assert found["records"]["fingerprints"] == [True, True]


def test_a_stack_is_saved_again_when_its_file_is_gone_and_not_because_it_was_written(found):
    assert found["records"]["saved"] == [0, 0, 1]


def test_a_change_of_the_checkpoint_is_seen_in_any_layer(found):
    """The file's first layer is the text encoder's, which both checkpoints share"""
    assert max(found["projected"]["wrong"]) < 1e-5


def test_norm_control_takes_an_oft_at_the_strength_that_is_left_it(found):
    """ComfyUI's OFT does not do twice as much at twice the strength"""
    bent = found["bent"]
    assert bent["strength"] == pytest.approx(0.8 / 2**0.5)
    assert bent["acting"] < 1e-5 < 0.01 < bent["asked"]


def test_a_new_strength_decomposes_nothing_again(found):
    """A LoHa's change is the same on all checkpoints of a kind; a DoRA's is not"""
    assert found["projected"]["decomposed"] == [1, 0, 0, 2, 0, 2, 0, 0]


def test_what_is_decomposed_is_where_plain_loras_are(found):
    """On the processor, whatever holds the model"""
    assert found["projected"]["factors"] == ["cpu torch.float32"]
