"""What a concept's file says about itself, and the hashes other programs know it by."""

import hashlib
import json
import sys

import pytest
import torch

from seqlora_core.adapter import Adapter, LayerDelta, save_adapter
from seqlora_core.concept import Concept
from seqlora_core.demo_model import DEMO_MODEL
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.metadata import Base, curves, shortened, tag_frequency
from seqlora_core.plots import kept_curves_picture
from seqlora_core.statistics import Moments
from seqlora_core.tensor_file import SMALL

from ..reliability.toy import ToyDenoiser, start
from ..reliability.toy import teach as teach_toy


def header(path):
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    return json.loads(blob[8 : 8 + length])["__metadata__"], blob, 8 + length


def test_the_hashes_are_those_of_the_files_bytes(library):
    """AutoV3: SHA-256 of all that follows the header."""
    said, blob, start = header(library.paths("octopus")[0])
    plain = hashlib.sha256(blob[start:]).hexdigest()
    assert said["sshs_model_hash"] == plain and said["modelspec.hash_sha256"] == f"0x{plain}"


def test_the_legacy_hash_is_of_the_file_with_its_ss_metadata_alone(tmp_path):
    """A file longer than a megabyte, hashed as the old web interface did."""
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    layers = {
        f"diffusion_model.{i}": LayerDelta(torch.randn(8, 4096, generator=generator), torch.randn(4096, 8, generator=generator))
        for i in range(6)
    }
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_adapter(path, Adapter(layers, {"ss_output_name": "猫", "seqlora.trigger": "x"}))
    said, *_ = header(path)
    save_file(load_file(path), again, {k: v for k, v in said.items() if k.startswith("ss_")})
    blob = again.read_bytes()
    assert said["sshs_legacy_hash"] == hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8]
    assert said["sshs_model_hash"] == hashlib.sha256(blob[8 + int.from_bytes(blob[:8], "little") :]).hexdigest()


def test_what_the_file_says(library):
    said, *_ = header(library.paths("fox")[0])
    assert said["ss_network_module"] == "networks.lora" and said["ss_network_dim"] == said["ss_network_alpha"] == "4"
    assert (
        said["ss_steps"] == said["ss_max_train_steps"] == "12"
        and said["ss_seed"] == "0"
        and said["ss_num_train_images"] == "10"
    )
    assert said["ss_resolution"] == "(64, 64)" and said["modelspec.resolution"] == "64x64"
    assert said["ss_base_model_version"] == "sd3" and said["modelspec.architecture"] == "stable-diffusion-3/lora"
    assert said["ss_new_sd_model_hash"] == hashlib.sha256(DEMO_MODEL.read_bytes()).hexdigest()
    assert said["modelspec.title"] == "fox" and said["modelspec.trigger_phrase"] == said["seqlora.trigger"] == "foxqi"
    tags = json.loads(said["ss_tag_frequency"])["fox"]
    assert tags["a foxqi animal"] == 8 and tags["a small foxqi animal"] == 2 and sum(tags.values()) == 30
    assert tags["foxqi animal"] == 10  # what calls it, whatever the captions look like
    assert json.loads(said["ss_datasets"])[0]["subsets"][0]["class_tokens"] == "foxqi animal"
    kept = json.loads(said["seqlora.curves"])
    assert kept["every"] == 1 and len(kept["loss"]) == len(kept["interference"]) == 12 and min(kept["loss"]) > 0
    assert json.loads(said["seqlora.constraint"])["to"] == ["octopus", "penguin"] and said["seqlora.order"] == "2"
    assert (
        len(said["seqlora.library"]) == 16
        and said["seqlora.library"] == header(library.paths("octopus")[0])[0]["seqlora.library"]
    )
    assert not any("date" in key or "started" in key or "finished" in key for key in said)


def test_the_phrase_is_counted_in_whatever_case():
    tags = tag_frequency("x", ["a Zqx cat, red", "ZQX CAT, red", "zqx cat", "a dog"], "zqx cat")["x"]
    assert tags == {"a Zqx cat": 1, "a dog": 1, "red": 2, "zqx cat": 3}
    assert tag_frequency("x", ["two zqx cats", "a bazqx cat"], "zqx cat")["x"]["zqx cat"] == 1


def test_tags_are_kept_as_far_as_a_header_has_room(tmp_path):
    """The most frequent, and what calls it; too long captions to keep are told before anything is trained"""
    tags = {f'a "{i:05}" seen once, 猫': 1 for i in range(20_000)} | {"a small light": 7, "zqx": 1}
    assert shortened({"x": {"zqx": 1, "a": 2}}, "zqx") == {"x": {"a": 2, "zqx": 1}}
    kept = shortened({"x": tags}, "zqx")["x"]
    assert {"zqx", "a small light"} < set(kept) and 5_000 < len(kept) < 10_000 and list(kept) == sorted(kept)
    text = json.dumps({"ss_tag_frequency": json.dumps({"x": kept}, ensure_ascii=False)}, ensure_ascii=False)
    assert len(text.encode()) < SMALL // 4
    model = ToyDenoiser()
    library = start(tmp_path / "toy", model)
    with pytest.raises(UserError, match="captions of 4 pictures.* are 400,0.. bytes long.*shorten them"):
        teach_toy(model, library, "fox", captions=["foxzx " + "long " * 20_000] * 4)
    teach_toy(model, library, "fox", captions=["foxzx " + "long, " * 5_000 + str(i) for i in range(4)], steps=1)
    assert Library(library.folder).load("fox").captions[0].startswith("foxzx long")


def test_a_model_whose_file_is_unknown_says_no_hash():
    said = Base("x", "flux").metadata()
    assert said["modelspec.architecture"] == "flux-1-dev/lora" and "ss_new_sd_model_hash" not in said


@pytest.mark.parametrize("value, message", [(0.0, "every lora_up is zero"), (float("nan"), "not finite")])
def test_a_useless_concept_leaves_nothing_in_the_library(tmp_path, value, message):
    library = Library(tmp_path / "l", "base", create=True)
    adapter = Adapter({"diffusion_model.a": LayerDelta(torch.ones(2, 8), torch.full((6, 2), value))})
    concept = Concept("x", "x", "", adapter, Moments({"diffusion_model.a": torch.eye(8)}), {}, torch.zeros(0), [])
    with pytest.raises(UserError, match=message):
        library.add(concept)
    assert library.names == [] and not list(library.folder.glob("*.safetensors"))


def test_long_curves_are_thinned_to_means():
    kept = curves([float(i) for i in range(1201)], [1.0] * 1201)
    assert kept["every"] == 3 and len(kept["loss"]) == 401 and kept["loss"][:2] == [1.0, 4.0]
    assert kept["loss"][-1] == 1200 and set(kept["interference"]) == {1.0}


def test_kept_curves_are_drawn_and_what_is_none_says_so(monkeypatch):
    few, many = ({"seqlora.curves": json.dumps(curves([1.0 / (i + 1) for i in range(n)], [0.1] * n))} for n in (40, 2000))
    assert kept_curves_picture(few).shape == kept_curves_picture(many).shape == (1, 450, 1000, 3)
    bad = [{}, {"seqlora.curves": "["}, {"seqlora.curves": '{"every": 1, "loss": ["x"], "interference": [1]}'}]
    sentences = [kept_curves_picture(metadata) for metadata in bad]
    assert all(p.shape == sentences[0].shape != (1, 450, 1000, 3) and p.std() > 0.05 for p in sentences)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert kept_curves_picture(few).std() > 0.05 and not torch.equal(kept_curves_picture(few), sentences[0])
