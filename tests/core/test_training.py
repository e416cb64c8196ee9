"""Training on the real demo model: what the files hold, what survives a cancel, what is refused."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from seqlora_core import statistics, subspace, trainer
from seqlora_core.adapter import Adapter, LayerDelta, load_adapter, read_safetensors
from seqlora_core.attach import Attachment, Site, attached
from seqlora_core.calibration import record_moments
from seqlora_core.concept import Concept
from seqlora_core.config import TrainingConfig
from seqlora_core.demo_model import DemoModel
from seqlora_core.denoiser import loss
from seqlora_core.errors import UserError
from seqlora_core.evaluation import held_out_loss
from seqlora_core.interference import energies
from seqlora_core.labelled import labelled_grid
from seqlora_core.library import Library
from seqlora_core.linalg import ridge
from seqlora_core.statistics import Moments, Recorder
from seqlora_core.teach import train_concept
from seqlora_core.trainer import fit

from ..reliability.toy import ToyDenoiser
from .conftest import teach


def test_stored_bases_are_orthonormal_and_disjoint_in_the_metric(library):
    concepts, g = library.concepts(), library.calibration().moments
    for name, basis in concepts[0].bases.items():
        metric = subspace.Metric.of(g[name].double())
        for i, first in enumerate(concepts):
            gram = first.bases[name].double().mT @ first.bases[name].double()
            assert (gram - torch.eye(gram.shape[0])).abs().max() < 1e-5
            for second in concepts[:i]:
                assert (first.bases[name].double().mT @ second.bases[name].double()).abs().max() < 1e-5
                # and the same from the LoRA files alone: D_i ridge(G) D_j^T = 0
                a, b = first.adapter.layers[name].down.double(), second.adapter.layers[name].down.double()
                assert (a @ ridge(g[name].double(), subspace.EPS) @ b.mT).abs().max() < 1e-5
        assert torch.allclose(metric.basis(concepts[0].adapter.layers[name].down.double()), basis.double(), atol=1e-4)


def test_moments_equal_a_float64_recomputation(model, subjects):
    """Inputs captured by a hook of our own, summed with numpy in float64."""
    subject, site = subjects["octopus"], model.sites()[4]
    captured = []
    handle = site.modules[0].register_forward_hook(lambda m, a, o: captured.append(a[0].detach().numpy().astype(np.float64)))
    try:
        prompts = model.encode_prompts(subject.references.captions)
        moments = record_moments(model, subject.references.latents, prompts)
    finally:
        handle.remove()
    rows = np.concatenate([c.reshape(-1, c.shape[-1]) for c in captured])
    plain = rows.T @ rows / len(rows)
    assert np.abs(moments[site.name].numpy() - plain).max() < 1e-5 * np.abs(plain).max()


def test_energy_from_stored_files_equals_what_the_layers_put_out(model, library, subjects):
    """`energies` from files = mean |A D x|^2 over the recorded inputs."""
    subject, concept = subjects["octopus"], library.load("octopus")
    prompts = model.encode_prompts(subject.references.captions)
    other = library.load("penguin").adapter
    total, counts = {}, {}

    def add(name, x):
        d = other.layers[name]
        out = x.reshape(-1, x.shape[-1]).double() @ d.down.double().mT @ d.up.double().mT
        total[name] = total.get(name, 0) + out.square().sum().item()
        counts[name] = counts.get(name, 0) + len(out)

    # the same pass as record_moments makes, with a recorder of our own in its place
    real, Recorder._record = Recorder._record, lambda self, name, x: add(name, x) or real(self, name, x)
    try:
        record_moments(model, subject.references.latents, prompts, concept.adapter)
    finally:
        Recorder._record = real
    plain = sum(total[n] / counts[n] for n in total)
    stored = sum(energies([d], [concept.moments.layers[n]]).item() for n, d in other.layers.items())
    assert stored == pytest.approx(plain, rel=1e-4)


def test_a_trained_concept_is_an_ordinary_lora_file(library):
    path, stats = library.paths("octopus")
    tensors, metadata = read_safetensors(path)
    assert {k.rsplit(".", 2)[-2] if k.endswith("weight") else "alpha" for k in tensors} == {"lora_down", "lora_up", "alpha"}
    assert all(k.startswith("diffusion_model.joint_blocks.") for k in tensors)
    assert metadata["modelspec.trigger_phrase"] == "octzu" and "octzu" in metadata["ss_tag_frequency"]
    assert stats.exists()


def test_training_lowers_the_held_out_loss(model, subjects, new_library, tmp_path):
    library = new_library(tmp_path / "l")
    concept, fit = teach(model, library, subjects["octopus"], steps=60, learning_rate=3e-3)
    base = held_out_loss(model, subjects["octopus"].held_out)
    assert held_out_loss(model, subjects["octopus"].held_out, concept.adapter) < base - 0.005
    assert all(d.up.abs().max() > 0 for d in concept.adapter.layers.values())
    assert len(fit.losses) == 60 and np.isfinite(fit.losses).all()


def test_a_preview_shows_the_concept_once(model, library, subjects, tmp_path):
    """Drawn from inside the loop, where earlier concepts were active a moment ago, as from its file afterwards."""
    import shutil

    from seqlora_core.preview import draw_with

    shutil.copytree(library.folder, tmp_path / "l")
    previews, s = [], subjects["octopus"]
    captions = [c.replace("octzu", "newzu") for c in s.references.captions]

    def on_step(step):
        previews.append(draw_with(model, step.snapshot(), ["a newzu animal"], (64, 64)))

    config = TrainingConfig(steps=3, concept_dropout=False)
    concept, _ = train_concept(
        model, Library(tmp_path / "l"), s.images, "again", "newzu", s.class_noun, captions, config, on_step
    )
    assert torch.allclose(previews[-1], draw_with(model, concept.adapter, ["a newzu animal"], (64, 64)), atol=1e-5)


def test_one_seed_gives_one_file(model, subjects, new_library, tmp_path):
    files = []
    for name in ("a", "b"):
        library = new_library(tmp_path / name)
        teach(model, library, subjects["octopus"], steps=4)
        files.append(library.paths("octopus")[0].read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
def test_cancel_keeps_what_was_trained(model, subjects, new_library, tmp_path, exception):
    library = new_library(tmp_path / "l")

    def cancel(step):
        if step.number == 5:
            raise exception("enough")

    _, fit = teach(model, library, subjects["octopus"], steps=50, on_step=cancel)
    assert isinstance(fit.stopped, exception)
    assert len(fit.losses) == 5
    kept = load_adapter(library.paths("octopus")[0])
    assert kept.metadata["seqlora.steps_done"] == "5"
    assert Library(tmp_path / "l").names == ["octopus"]


def test_no_hook_and_no_changed_weight_is_left(model, subjects, new_library, tmp_path):
    before = {k: v.clone() for k, v in model.mmdit.state_dict().items()}
    library = new_library(tmp_path / "l")

    def fail(step):
        raise RuntimeError("boom")

    teach(model, library, subjects["octopus"], steps=3, on_step=fail)
    assert sum(len(m._forward_hooks) for m in model.mmdit.modules()) == 0
    assert all(torch.equal(v, before[k]) for k, v in model.mmdit.state_dict().items())


def test_ablation_switches_all_train(monkeypatch, model, subjects, new_library, tmp_path):
    monkeypatch.setattr("seqlora_core.replay.decoy_count", lambda size: 3)
    switches = (
        {"lower_steps": 1, "hypergradient": "cg:2", "drift_budget": 0.0},
        {"lower_steps": 1, "hypergradient": "neumann:2", "replay_target": "before"},
        {"lower_steps": 1, "line_search": True, "retraction": "polar", "concept_dropout": False},
        {"lower_steps": 2, "whitened": False, "data_start": False},
        {"orthogonal": False, "earlier_active": False, "use_decoys": False},
        {"learn_basis": False, "replay_weight": 0.0},
    )
    library = new_library(tmp_path / "l")
    teach(model, library, subjects["penguin"], steps=2)
    for number, switch in enumerate(switches):
        config = TrainingConfig(steps=3, batch=2, replay_batch=4, **switch)
        s, trigger = subjects["octopus"], f"octzu{number}"
        captions = [c.replace("octzu", trigger) for c in s.references.captions]
        _, fit = train_concept(model, library, s.images, f"c{number}", trigger, s.class_noun, captions, config)
        assert np.isfinite(fit.losses).all(), switch


@pytest.mark.parametrize(("lower_steps", "every"), [(0, 2), (1, 2), (2, 3)])
def test_both_levels_see_replays(monkeypatch, model, subjects, calibration, lower_steps, every):
    """Also where replays and basis steps have one period"""
    from seqlora_core.objective import Objective

    seen, gradients = {False: [], True: []}, Objective.gradients
    monkeypatch.setattr(Objective, "gradients", lambda self, up: seen[up].append(self.replays) or gradients(self, up))
    config = TrainingConfig(steps=12, batch=2, replay_batch=4, lower_steps=lower_steps, replay_every=every, use_decoys=False)
    fit(model, subjects["octopus"].references, "octzu", [], calibration, config)
    for turns in seen.values() if lower_steps else [seen[False]]:
        assert turns == [n % every == 0 for n in range(1, len(turns) + 1)]
    assert len(seen[True]) == (12 // (lower_steps + 1) if lower_steps else 0)


def test_a_full_layer_shares_and_says_so(model, subjects, new_library, tmp_path):
    """Planned for 1 concept, rank as wide as the layers allow: the second one must share."""
    library = new_library(tmp_path / "l", planned=1)
    teach(model, library, subjects["octopus"], steps=2, rank=180)
    _, fit = teach(model, library, subjects["penguin"], steps=2, rank=180)
    assert any("is full" in note and "are shared, of octopus" in note for note in fit.notes)
    assert any("concept 2 of a library planned for 1" in note for note in fit.notes)


def test_a_trigger_that_another_concept_has_is_told(model, subjects, new_library, tmp_path):
    library, s = new_library(tmp_path / "l"), subjects["octopus"]
    teach(model, library, s, steps=1)
    given = s.images, "second", "OCTZU", s.class_noun, s.references.captions
    _, fit = train_concept(model, library, *given, TrainingConfig(steps=1))
    assert "the trigger 'OCTZU' calls 'octopus' of this library too: use one of them at a time" in fit.notes


def test_what_planning_for_many_leaves_to_each_is_told(model, subjects, new_library, tmp_path):
    _, fit = teach(model, new_library(tmp_path / "l", planned=101), subjects["octopus"], steps=1)
    assert fit.notes == ["planned for 101 concepts, each gets rank 1 in layers of 192 inputs, of 4 asked for"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": ""}, "name is empty"),
        ({"name": "../x"}, "cannot be a file name"),
        ({"name": "octopus"}, "already"),
        ({"name": "OCTOPUS"}, "already"),
        ({"trigger": " "}, "trigger is empty"),
        ({"trigger": "absent"}, "lacks the trigger"),
        ({"images": torch.zeros(0, 64, 64, 3)}, "no reference images"),
        (
            {"images": torch.zeros(4, 3, 64, 64)},
            r"pictures are \[4, 3, 64, 64\] of float32: give \[n, height, width, 3\], from 0 to 1",
        ),
        ({"images": torch.zeros(4, 64, 64, 3, dtype=torch.uint8)}, "of uint8: give"),
        ({"captions": ["a zqx animal"]}, "1 captions for [0-9]+ pictures: give one for each"),
        ({"config": TrainingConfig(rank=0)}, "rank is 0"),
        ({"config": TrainingConfig(learning_rate=-1.0)}, "learning_rate is -1"),
        ({"config": TrainingConfig(interference_weight=-1.0)}, "interference_weight is -1"),
    ],
)
def test_bad_input_is_refused_before_any_work(model, library, subjects, change, message):
    s = subjects["octopus"]
    arguments = dict(
        images=s.images, name="new", trigger=s.trigger, class_noun=s.class_noun, captions=s.references.captions,
        config=TrainingConfig(steps=2),
    ) | change  # fmt: skip
    with pytest.raises(UserError, match=message):
        train_concept(model, library, **arguments)
    assert library.names == ["octopus", "penguin", "fox"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_of_any_float_type_teach_the_same(dtype, tmp_path):
    toy, found = ToyDenoiser(), []
    images = torch.randint(0, 5, (3, 16, 16, 3), generator=torch.Generator().manual_seed(0)) / 4
    for kind in (torch.float32, dtype):
        library = Library(tmp_path / str(kind), toy.fingerprint(), create=True)
        config = TrainingConfig(steps=2, batch=2, replay_batch=2)
        found.append(train_concept(toy, library, images.to(kind), "thing", "octzu", config=config)[1].losses)
    assert found[0] == found[1]


def test_a_loss_that_is_not_finite_ends_in_one_sentence_and_saves_nothing(model, subjects, new_library, tmp_path):
    library = new_library(tmp_path / "l")
    s = subjects["octopus"]
    broken = s.images.clone()
    broken[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        train_concept(model, library, broken, "x", s.trigger, s.class_noun, s.references.captions, TrainingConfig(steps=30))
    assert library.names == []


def test_what_is_not_finite_is_told_where_it_comes_from(model, subjects, new_library, tmp_path, monkeypatch):
    library = new_library(tmp_path / "l")
    s = subjects["octopus"]
    broken, predict, encode = s.images.clone(), model.predict, model.encode_images
    broken[1] = float("nan")
    nothing = float("nan")

    config = TrainingConfig(steps=30, retraction="polar", use_decoys=False)

    def train(images, message):
        with pytest.raises(UserError, match=message):
            train_concept(model, library, images, "x", s.trigger, s.class_noun, s.references.captions, config)
        assert library.names == []

    train(broken, "picture 2 holds values that are not finite")
    monkeypatch.setattr(model, "predict", lambda *given: predict(*given) * (nothing if torch.is_grad_enabled() else 1))
    train(s.images, "the loss is not finite at step 1")

    def overflowing(*given):  # as in half precision
        found = predict(*given)
        if found.requires_grad:
            found.register_hook(lambda gradient: gradient * float("inf"))
        return found

    monkeypatch.setattr(model, "predict", overflowing)
    train(s.images, "the gradient of the loss is not finite at step 1")
    monkeypatch.setattr(model, "encode_images", lambda images: encode(images) * nothing)
    train(s.images, "the VAE makes values of picture 1 that are not finite: load it in another precision")


def test_a_calibration_that_is_not_finite_is_not_kept(model, subjects, tmp_path, monkeypatch):
    library, s = Library(tmp_path / "l", model.fingerprint(), create=True), subjects["octopus"]
    monkeypatch.setattr(model, "predict", lambda noised, *_: noised * float("nan"))
    with pytest.raises(UserError, match="what the model draws is not finite: load it in a wider precision"):
        train_concept(model, library, s.images, "x", s.trigger, s.class_noun, s.references.captions, TrainingConfig(steps=1))
    assert library.calibration() is None


def test_a_replaced_concept_keeps_its_place(model, subjects, new_library, tmp_path):
    library = new_library(tmp_path / "l")
    for name in ("octopus", "penguin"):
        teach(model, library, subjects[name], steps=2)
    s = subjects["octopus"]
    before = library.paths("octopus")[0].read_bytes()
    train_concept(
        model, library, s.images, "octopus", s.trigger, s.class_noun, s.references.captions, TrainingConfig(steps=3),
        replace_existing=True,
    )  # fmt: skip
    assert library.names == ["octopus", "penguin"]
    assert library.paths("octopus")[0].read_bytes() != before


def test_hooks_add_what_the_file_says(model, library):
    """Prediction with the hooks on = prediction of a model whose weights were changed by up @ down."""
    import copy

    adapter = library.load("octopus").adapter
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, 16, 8, 8, generator=generator), torch.randn(2, 16, 8, 8, generator=generator)
    sigma, prompts = torch.tensor([0.3, 0.8]), model.encode_prompts(["an octzu animal", "a castle"])
    attachment = Attachment()
    attachment.set_frozen(adapter)
    with torch.no_grad(), attached(model.sites(), attachment):
        hooked = loss(model, x, noise, sigma, prompts)
    changed = copy.deepcopy(model)
    changed._sites = None
    for site in changed.sites():
        rows = 0
        for module in site.modules:
            count = module.weight.shape[0]
            module.weight.data += adapter.layers[site.name].dense()[rows : rows + count]
            rows += count
    with torch.no_grad():
        merged = loss(changed, x, noise, sigma, prompts)
    assert torch.allclose(hooked, merged, rtol=1e-5)


def test_preview_has_a_row_from_before_and_one_of_now(model):
    from seqlora_core.preview import Preview

    preview = Preview(model, "octzu", "animal", [], (64, 64))
    adapter = Adapter({s.name: LayerDelta(torch.ones(1, s.in_features), torch.ones(s.out_features, 1)) for s in model.sites()})
    first, second = preview.draw("step 1", Adapter({})), preview.draw("step 2", adapter)
    assert preview.heads == ["the new concept", "unrelated"] and first.size == second.size
    middle = first.height // 2
    before, now = (np.asarray(second.crop((0, y, second.width, y + 150))) for y in (40, middle + 10))
    assert np.array_equal(np.asarray(first)[:middle], np.asarray(second)[:middle])  # the same seeds
    assert not np.array_equal(before, now)


def test_words_beside_pictures_are_legible_in_any_script_and_of_any_length():
    row = [torch.ones(1, 64, 64, 3)]

    def drawn(name, head="x"):
        return labelled_grid([row], [name], [head], 128)

    for one, other in (("Ж", "Д"), ("猫", "犬")):
        assert drawn(one).tobytes() != drawn(other).tobytes() and drawn("x", one).tobytes() != drawn("x", other).tobytes()
    plain = drawn("n", "m")
    assert drawn("n" * 80, "a head of many words " * 40).width < 2 * 320 + 60 and plain.width == drawn("n", "m m").width
    assert drawn("n", "m " * 4000).height < plain.height + 60


def test_earlier_concepts_moments_are_read_one_at_a_time(library, monkeypatch):
    """Of a hundred concepts all of them would not fit into memory"""
    real, alive, most = statistics.read_statistics, [], []

    def counted(path):
        found = real(path)
        alive.append([weakref.ref(t) for t in found[0].layers.values()])
        most.append(sum(any(t() is not None for t in one) for one in alive))
        return found

    whole = statistics.average(c.moments for c in library.concepts())
    stored = library.concepts(stored_moments=True)
    monkeypatch.setattr(statistics, "read_statistics", counted)
    averaged = statistics.average(c.moments for c in stored)
    assert len(most) == 3 and max(most) <= 2
    assert averaged.layers.keys() == whole.layers.keys() and averaged.shared() == whole.shared()
    assert all(torch.equal(averaged[n], whole[n]) for n in whole.layers)


def test_only_the_layers_that_are_named_learn(model, subjects, calibration, new_library, tmp_path):
    library = new_library(tmp_path / "l")
    teach(model, library, subjects["fox"], layers="context_block, -qkv", steps=2)
    teach(model, library, subjects["octopus"], steps=2)
    some, all_of_them = library.concepts()
    assert some.adapter.layers and all("context_block" in n and "qkv" not in n for n in some.adapter.layers)
    assert some.bases.keys() == some.adapter.layers.keys() < all_of_them.adapter.layers.keys()
    with pytest.raises(
        UserError, match="no layer of this model is named by layers 'cross': its layers are such as diffusion_model"
    ):
        teach(model, library, subjects["penguin"], layers="cross", steps=2)


def test_adaptive_rank_leaves_room(model, subjects, calibration, new_library, tmp_path):
    library = new_library(tmp_path / "l")
    teach(model, library, subjects["fox"], rank_energy=0.3, steps=2)
    (concept,) = library.concepts()
    ranks = {d.rank for d in concept.adapter.layers.values()}
    assert min(ranks) < 4 and all(b.shape[1] == concept.adapter.layers[n].rank for n, b in concept.bases.items())


def test_a_library_of_a_model_with_a_layer_that_nothing_uses_is_read_and_taught_more(calibration, subjects, tmp_path):
    """As the text half of some models' last block: lora_up stays zero there, so the LoRA leaves the layer out"""
    model, name = DemoModel(), "diffusion_model.unused"
    used = model.sites()[0]
    unused = torch.nn.Linear(used.in_features, 4)

    def run_unused(module, args, output):
        unused(args[0])

    used.modules[0].register_forward_hook(run_unused)
    model._sites = [*model.sites(), Site(name, (unused,), used.in_features, 4)]
    general = Moments({**calibration.moments.layers, name: calibration.moments.layers[used.name]})
    library = Library(tmp_path / "library", model.fingerprint(), create=True)
    library.keep_calibration(replace(calibration, moments=general))
    teach(model, library, subjects["octopus"], steps=2)
    first = library.load("octopus")
    assert name not in first.adapter.layers and set(first.bases) == set(first.adapter.layers) and name in first.moments.layers
    with_it = replace(first, bases={**first.bases, name: torch.eye(used.in_features)[:, :4]})
    library.add(with_it, replace_existing=True)  # as it was once written
    assert set(library.load("octopus").bases) == set(first.bases) and library.verify() == []
    teach(model, library, subjects["penguin"], steps=2)
    assert library.verify() == [] and name not in library.load("penguin").bases
    library.add(replace(first, bases={name: with_it.bases[name]}), replace_existing=True)
    with pytest.raises(UserError, match="does not belong to octopus.safetensors"):
        library.load("octopus")


def test_a_fit_is_protected_from_decoys_and_earlier_concepts(monkeypatch, model, subjects, calibration):
    """What `others_moments` makes of them is what its groups' energy is measured on"""
    given, made = [], []

    class Enough(Exception):
        pass

    def others(*args):
        given.extend(args)
        made.append(Moments(dict(args[0].layers)))
        return made[0]

    def groups(denoiser, seen, others, *_):
        assert others is made[0]
        raise Enough

    monkeypatch.setattr(trainer, "others_moments", others)
    monkeypatch.setattr(trainer, "starting_groups", groups)
    s, config = subjects["octopus"].references, TrainingConfig()
    earlier = [Concept("one", "zwx", "", Adapter({}), calibration.moments, {}, torch.zeros(0), [])]
    with pytest.raises(Enough):
        fit(model, s, "octzu", earlier, calibration, config)
    general, decoys, held, said = given
    assert general is calibration.moments and held is earlier and said is config
    name = model.sites()[0].name
    assert (decoys[name] - general[name]).norm() > 0.01 * general[name].norm()


def test_earlier_concepts_are_off_on_or_half_of_them_on_from_step_to_step():
    """None of three and all of them a quarter of the time each, and an eighth of the other half"""
    deltas = [Adapter({"l": LayerDelta(torch.ones(r, 4), torch.ones(5, r))}) for r in (1, 2, 1)]
    earlier = [Concept(str(i), "", "", a, None, {}, torch.zeros(0), []) for i, a in enumerate(deltas)]
    active, attachment = trainer._Earlier(earlier, [], TrainingConfig(), "cpu"), Attachment()
    generator, times, found = torch.Generator().manual_seed(0), 4000, {}
    for _ in range(times):
        count, mask = active.switch(attachment, generator), attachment.mask["l"].tolist()
        assert mask[1] == mask[2] and count == mask[0] + mask[1] + mask[3]
        found[tuple(mask)] = found.get(tuple(mask), 0) + 1 / times
    assert found.pop((0, 0, 0, 0)) == pytest.approx(5 / 16, abs=0.03)
    assert found.pop((1, 1, 1, 1)) == pytest.approx(5 / 16, abs=0.03)
    assert len(found) == 6 and list(found.values()) == pytest.approx([1 / 16] * 6, abs=0.02)
    always = trainer._Earlier(earlier, [], TrainingConfig(concept_dropout=False), "cpu")
    assert {always.switch(attachment, generator) for _ in range(20)} == {3}
