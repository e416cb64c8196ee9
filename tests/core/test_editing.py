"""Libraries that are merged, refitted, reordered: nothing is trained again and nothing is lost."""

import shutil

import pytest
import torch

from seqlora_core.composition import closed_form
from seqlora_core.editing import refit
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.repair import repair
from seqlora_core.report import interference_report

from .conftest import teach


@pytest.fixture(scope="module")
def other(model, subjects, new_library, tmp_path_factory):
    """A library of one concept, trained apart"""
    library = new_library(tmp_path_factory.mktemp("libraries") / "other")
    teach(model, library, subjects["fox"], steps=6)
    (moved := library.folder).rename(moved.parent / "renamed")
    return Library(moved.parent / "renamed")


@pytest.fixture
def pair(library, tmp_path):
    """The first two of the trio"""
    shutil.copytree(library.folder, tmp_path / "pair")
    pair = Library(tmp_path / "pair")
    pair.remove("fox")
    return pair


def test_merging_is_the_closed_form_and_leaves_the_sources(pair, other, tmp_path):
    before = {p: p.read_bytes() for lib in (pair, other) for p in lib.folder.glob("*.safetensors")}
    merged, price = refit([pair, other], tmp_path / "merged")
    assert merged.names == ["octopus", "penguin", "fox"] and merged.verify() == []
    assert all(p.read_bytes() == content for p, content in before.items())
    concepts = [*pair.concepts(), *other.concepts()]
    wanted = closed_form([c.adapter for c in concepts], [c.moments for c in concepts], pair.calibration().moments)
    for concept, adapter in zip(merged.concepts(), wanted):
        for name, delta in concept.adapter.layers.items():
            assert torch.allclose(delta.down, adapter.layers[name].down)
    assert price.after < price.before and 0 < price.lost < 1
    assert f"{price.after:.1%}" in price.text()


def test_the_price_is_what_a_report_says(pair, other, tmp_path):
    """The sum of the report's crosstalk, weighted by each target's own energy, falls as told."""
    merged, price = refit([pair, other], tmp_path / "merged")
    both = {
        "before": {c.name: c.adapter for c in [*pair.concepts(), *other.concepts()]},
        "after": {c.name: c.adapter for c in merged.concepts()},
    }
    moments = {c.name: c.moments for c in merged.concepts()}
    off = {k: sum(map(sum, interference_report(a, moments).crosstalk)) - 3 for k, a in both.items()}
    assert off["after"] < off["before"]


def test_a_merged_library_can_be_taught_more(model, subjects, pair, other, tmp_path):
    merged, _ = refit([pair, other], tmp_path / "merged")
    subject = subjects["octopus"]
    merged.remove("octopus")
    teach(model, merged, subject, steps=2)
    assert merged.names == ["penguin", "fox", "octopus"]
    new, others = merged.load("octopus"), [merged.load(n) for n in ("penguin", "fox")]
    for name, basis in new.bases.items():
        for c in others:
            assert (basis.mT @ c.bases[name]).abs().max() < 1e-5


@pytest.mark.parametrize("what", ["names", "base", "folder"])
def test_what_cannot_be_merged_is_told(pair, other, library, tmp_path, what):
    sources, target, message = [pair, other], tmp_path / "merged", ""
    if what == "names":
        sources, message = [library, other], "two of the libraries hold a concept 'fox'"
    elif what == "base":
        pair.manifest["base"], message = "another", "different base models"
    else:
        target, message = pair.folder, "not empty"
    with pytest.raises(UserError, match=message):
        refit(sources, target)


def test_reorder_lists_anew_and_survives(library, tmp_path):
    shutil.copytree(library.folder, tmp_path / "l")
    opened = Library(tmp_path / "l")
    opened.reorder(["fox", "octopus", "penguin"])
    assert Library(tmp_path / "l").names == ["fox", "octopus", "penguin"]
    with pytest.raises(UserError, match="every concept once"):
        opened.reorder(["fox"])


def test_order_of_training_survives_removal_and_repair(model, subjects, library, tmp_path):
    shutil.copytree(library.folder, tmp_path / "l")
    opened = Library(tmp_path / "l")
    opened.remove("octopus")
    teach(model, opened, subjects["octopus"], steps=2)
    assert opened.names == ["penguin", "fox", "octopus"]
    opened.manifest_path.unlink()
    assert repair(tmp_path / "l").names == ["penguin", "fox", "octopus"]
