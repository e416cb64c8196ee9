"""Libraries that are merged, refitted, reordered: nothing is trained again and nothing is lost."""

import json
import shutil

import pytest
import torch

from seqlora_core.adapter import Adapter, LayerDelta
from seqlora_core.calibration import Calibration
from seqlora_core.composition import closed_form
from seqlora_core.concept import Concept
from seqlora_core.editing import refit, rename
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.linalg import orthonormal_basis
from seqlora_core.repair import repair
from seqlora_core.sketch import sketch
from seqlora_core.statistics import Moments
from seqlora_core.subspace import Metric

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


def test_the_price_is_what_dense_changes_do(pair, other, tmp_path):
    """`tr(dW S dW^T)` of all pairs, over that of each on its own inputs before"""
    merged, price = refit([pair, other], tmp_path / "merged")
    before, after = [*pair.concepts(), *other.concepts()], list(merged.concepts())

    def energy(mover, seer) -> float:
        changes = {n: d.dense().double() for n, d in mover.adapter.layers.items()}
        return sum(float((w @ seer.moments[n].double() @ w.mT).trace()) for n, w in changes.items())

    own = sum(energy(c, c) for c in before)
    for concepts, told in ((before, price.before), (after, price.after)):
        assert sum(energy(a, b) for a in concepts for b in concepts if a is not b) / own == pytest.approx(told, rel=1e-4)


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


def test_libraries_with_and_without_the_text_encoder_are_not_merged(pair, other, tmp_path):
    calibration = other.calibration()
    calibration.moments.layers["text_encoders.clip_l.x"] = torch.eye(8)
    shutil.copytree(other.folder, tmp_path / "texts")
    (with_text := Library(tmp_path / "texts")).keep_calibration(calibration)
    for sources in ([pair, with_text], [with_text, pair]):
        with pytest.raises(UserError, match="adapt the text encoder"):
            refit(sources, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_names_that_differ_in_case_are_not_merged_but_renamed(library, other, pair, tmp_path):
    rename(pair, "penguin", "FOX")
    assert pair.names == ["octopus", "FOX"] and pair.verify() == []
    with pytest.raises(UserError, match="two of the libraries hold a concept 'FOX'"):
        refit([pair, other], tmp_path / "merged")
    before = library.load("penguin")
    rename(pair, "FOX", "bird")
    after = pair.load("bird")
    assert pair.names == ["octopus", "bird"] and after.trigger == before.trigger
    assert all(torch.equal(d.down, before.adapter.layers[n].down) for n, d in after.adapter.layers.items())
    with pytest.raises(UserError, match="no concept 'owl'"):
        rename(pair, "owl", "eagle")


def test_a_trigger_that_two_concepts_share_is_told(pair, other, tmp_path):
    concept = other.load("fox")
    concept.trigger = pair.load("penguin").trigger
    other.add(concept, replace_existing=True)
    _, price = refit([pair, other], tmp_path / "merged")
    assert f"share the trigger {concept.trigger!r}" in price.text()


def test_tokens_that_learnt_triggers_share_are_told(tmp_path):
    """octzu and octvo, learnt apart, both moved what they have in common"""
    table, layer, sources = "text_encoders.t5xxl.transformer.shared", "diffusion_model.a", []
    seen, generator = Moments({layer: torch.eye(8)}), torch.Generator().manual_seed(0)
    for name, trigger, tokens in (("octopus", "octzu", [3, 4]), ("squid", "octvo", [3, 5]), ("fox", "foxri", [6, 7])):
        sources.append(library := Library(tmp_path / name, "base", create=True))
        library.keep_calibration(Calibration(seen, ["a"], torch.zeros(1, 4, 2, 2)))
        down = torch.randn(2, 8, generator=generator)
        delta, learnt = LayerDelta(down, torch.ones(6, 2)), LayerDelta(torch.ones(2, 4), torch.eye(10)[:, tokens])
        basis = {layer: orthonormal_basis(down.mT)}
        library.add(Concept(name, trigger, "", Adapter({layer: delta, table: learnt}), seen, basis, torch.zeros(0), []))
    _, price = refit(sources, tmp_path / "merged")
    (told,) = price.warnings
    assert told.startswith("the learnt triggers of octopus and squid have tokens in common")


def test_files_of_a_merged_library_say_how_they_were_made(pair, other, tmp_path):
    merged, _ = refit([pair, other], tmp_path / "merged")
    for concept in merged.concepts():
        constraint = json.loads(concept.adapter.metadata["seqlora.constraint"])
        assert "closed form" in constraint["lora_down"] and constraint["to"] == merged.names


def test_bases_of_layers_kept_as_sketches_are_of_their_own_metric(tmp_path):
    """Layers of several widths, all as sketches: each basis spans what its lora_down reads in its layer's own metric"""
    library, layers, generator = Library(tmp_path / "l", "base", create=True), {}, torch.Generator().manual_seed(0)

    def moment(width):
        rows = torch.randn(300, width, generator=generator) * torch.logspace(0.5, -1, width)
        return sketch(rows.mT @ rows / 300)

    widths = {f"diffusion_model.block.{i}.attn": (64, 96, 48)[i % 3] for i in range(9)}
    general = Moments({n: moment(w) for n, w in widths.items()})
    library.keep_calibration(Calibration(general, ["a"], torch.zeros(1, 4, 2, 2)))
    for name in ("owl", "bee"):
        layers = {n: LayerDelta(*(torch.randn(s, generator=generator) for s in ((2, w), (5, 2)))) for n, w in widths.items()}
        bases = {n: orthonormal_basis(Metric.of(general.layers[n]).basis(d.down)) for n, d in layers.items()}
        moments = Moments({n: moment(w) for n, w in widths.items()})
        library.add(Concept(name, name + "x", "bird", Adapter(layers), moments, bases, torch.zeros(0), []))
    merged, _ = refit([library], tmp_path / "merged")
    kept = merged.calibration().moments
    for concept in merged.concepts():
        for name, basis in concept.bases.items():
            wanted = orthonormal_basis(Metric.of(kept.layers[name]).basis(concept.adapter.layers[name].down))
            assert torch.allclose(basis, wanted, atol=1e-5)


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


def test_repair_keeps_the_order_of_a_manifest_that_is_whole(library, tmp_path):
    shutil.copytree(library.folder, tmp_path / "l")
    Library(tmp_path / "l").reorder(["fox", "octopus", "penguin"])
    assert repair(tmp_path / "l").names == ["fox", "octopus", "penguin"]


def test_a_concept_trained_anew_was_trained_last(library, tmp_path):
    shutil.copytree(library.folder, tmp_path / "l")
    opened = Library(tmp_path / "l")
    opened.add(opened.load("octopus"), replace_existing=True)
    assert opened.names == ["octopus", "penguin", "fox"]
    assert "octopus" in opened.cost("penguin") and opened.cost("octopus") == ""


def test_a_renamed_concept_was_trained_when_it_was(library, tmp_path):
    shutil.copytree(library.folder, tmp_path / "l")
    opened = Library(tmp_path / "l")
    rename(opened, "octopus", "squid")
    assert "penguin, fox were trained beside it" in opened.cost("squid") and "squid" not in opened.cost("penguin")
    opened.manifest_path.unlink()
    assert repair(tmp_path / "l").names == ["squid", "penguin", "fox"]
    rename(opened, "fox", "vixen")
    assert opened.cost("vixen") == "" and opened.names == ["squid", "penguin", "vixen"]
