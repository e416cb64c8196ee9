"""Libraries of every format that was ever written open as they were; a sample of each is kept in tests/samples."""

import json
import shutil
from pathlib import Path

import pytest

from seqlora_core import manifest
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.repair import repair
from seqlora_core.tensor_file import tensors_hash

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
# format -> hash of fox.safetensors' tensors, as it was written
WRITTEN = {
    1: "0d01a85c4845501bace5e33e7997df7f3c8837bd799fddeb43827b8fe02860d1",
    2: "0d01a85c4845501bace5e33e7997df7f3c8837bd799fddeb43827b8fe02860d1",
}


@pytest.fixture(params=WRITTEN)
def sample(request, tmp_path):
    shutil.copytree(SAMPLES / f"format_{request.param}", tmp_path / "sample")
    return request.param, tmp_path / "sample"


def test_there_is_a_sample_of_every_format():
    assert set(WRITTEN) == set(range(1, manifest.FORMAT + 1))
    assert {p.name for p in SAMPLES.iterdir()} == {f"format_{n}" for n in WRITTEN}
    for number in WRITTEN:
        assert json.loads((SAMPLES / f"format_{number}" / "library.json").read_text())["format"] == number


def test_a_sample_opens_as_it_was(sample):
    number, folder = sample
    library = Library(folder)
    assert library.names == ["fox", "owl"] and library.planned == 8 and library.verify() == []
    fox = library.load("fox")
    assert (fox.trigger, fox.class_noun) == ("foxzx", "thing") and len(fox.adapter.layers) == 3
    assert len(fox.captions) == len(fox.latents) == 4 and set(fox.bases) == set(fox.adapter.layers)
    assert library.calibration().prompts
    assert tensors_hash(folder / "fox.safetensors") == WRITTEN[number]
    assert not (folder / ".lock").exists()  # reading changes nothing


def test_a_sample_can_be_changed_and_is_of_todays_format_then(sample):
    _, folder = sample
    Library(folder).reorder(["owl", "fox"])
    assert json.loads((folder / "library.json").read_text())["format"] == manifest.FORMAT
    Library(folder).remove("owl")
    assert Library(folder).names == ["fox"] and Library(folder).verify() == []


def test_the_first_manifests_named_no_order(sample):
    _, folder = sample
    found = json.loads((folder / "library.json").read_text())
    for entry in found["concepts"]:
        del entry["order"]
    (folder / "library.json").write_text(json.dumps({**found, "format": 1}))
    assert [e["order"] for e in Library(folder).manifest["concepts"]] == [0, 1]


def test_a_lost_manifest_is_rebuilt(sample):
    _, folder = sample
    before = Library(folder).manifest["concepts"]
    (folder / "library.json").unlink()
    assert [{k: e[k] for k in ("name", "trigger", "class_noun", "order")} for e in before] == [
        {k: e[k] for k in ("name", "trigger", "class_noun", "order")} for e in repair(folder).manifest["concepts"]
    ]


def test_a_newer_format_is_told(sample):
    _, folder = sample
    found = json.loads((folder / "library.json").read_text())
    (folder / "library.json").write_text(json.dumps({**found, "format": manifest.FORMAT + 1}))
    with pytest.raises(UserError, match="newer SeqLoRA"):
        Library(folder)
