"""What a library finds in its folder and did not put there."""

import shutil

import pytest
import torch

from seqlora_core.adapter import Adapter, LayerDelta, save_adapter
from seqlora_core.editing import rename
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.repair import repair

from .toy import teach


@pytest.mark.parametrize("file", ["cat.safetensors", "cat.stats.safetensors"])
def test_a_file_of_somebody_elses_is_not_replaced(model, library, file):
    path = library.folder / file
    save_adapter(path, Adapter({"diffusion_model.a": LayerDelta(torch.ones(2, 8), torch.ones(6, 2))}))
    before, steps = path.read_bytes(), []
    for change in (
        lambda: teach(model, library, "cat", steps=1, on_step=steps.append),
        lambda: teach(model, library, "cat", steps=1, replace_existing=True),
        lambda: rename(library, "fox", "cat"),
    ):
        with pytest.raises(UserError, match=f"{file} is not of this library: use another name.*library repair") as told:
            change()
        assert "\n" not in str(told.value)
    assert path.read_bytes() == before and library.names == ["fox"] and not steps


def test_a_concept_that_the_manifest_forgot_is_not_replaced_but_taken_in(model, library):
    text = library.manifest_path.read_text()
    teach(model, library, "owl", steps=2)
    before = [p.read_bytes() for p in library.paths("owl")]
    library.manifest_path.write_text(text)
    with pytest.raises(UserError, match="owl.safetensors is not of this library"):
        teach(model, library, "owl", 1, steps=2)
    assert repair(library.folder).names == ["fox", "owl"] and [p.read_bytes() for p in library.paths("owl")] == before


def test_a_library_that_lost_its_manifest_is_not_begun_anew(model, library):
    library.manifest_path.unlink()
    for create in (True, False):
        with pytest.raises(UserError, match="has lost its manifest: run 'seqlora library repair .*library'"):
            Library(library.folder, model.fingerprint(), create=create)
    assert not library.manifest_path.exists() and repair(library.folder).names == ["fox"]
    assert Library(library.folder, model.fingerprint(), create=True).names == ["fox"]


def test_moments_of_someones_lora_are_no_library(model, library, tmp_path):
    (tmp_path / "loras").mkdir()
    shutil.copy(library.paths("fox")[1], tmp_path / "loras" / f"cat.{model.fingerprint()}.stats.safetensors")
    with pytest.raises(UserError, match="no library"):
        Library(tmp_path / "loras")
    assert Library(tmp_path / "loras", model.fingerprint(), create=True).names == []
