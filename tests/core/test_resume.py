"""A run that was stopped goes on as if it had not been; what it was begun with is held."""

import os
import shutil
from dataclasses import replace

import pytest
import torch

from seqlora_core.adapter import load_adapter
from seqlora_core.checkpoint import SUFFIX, Checkpoints
from seqlora_core.config import Checkpointing, TrainingConfig
from seqlora_core.editing import rename
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.pictures import Pictures
from seqlora_core.teach import train_concept

from ..reliability.toy import SIZE, ToyDenoiser, start
from ..reliability.toy import teach as teach_toy

STEPS = 6
QUICK = {"use_decoys": False, "replay_batch": 4, "batch": 2}


def newly(subject):
    """With a trigger that no concept of the library has"""
    captions = [c.replace(subject.trigger, "newzu") for c in subject.references.captions]
    return replace(subject, trigger="newzu", references=replace(subject.references, captions=captions))


@pytest.fixture
def begin(library, tmp_path):
    """Function that copies the library of three concepts, for a fourth."""

    def make(name):
        shutil.copytree(library.folder, tmp_path / name)
        return Library(tmp_path / name)

    return make


def train(model, library, subject, config=None, stop_at=None, images=None, **checkpointing):
    def on_step(step):
        if step.number == stop_at:
            raise KeyboardInterrupt

    return train_concept(
        model, library, subject.images if images is None else images, "new", subject.trigger, subject.class_noun,
        subject.references.captions, config or TrainingConfig(steps=STEPS, **QUICK), on_step, checkpointing=Checkpointing(**checkpointing),
    )  # fmt: skip


def contents(library):
    return [path.read_bytes() for path in library.paths("new")]


@pytest.mark.parametrize(
    "options",
    [{}, QUICK | {"drift_budget": 0.0, "replay_weight": 0.0}, QUICK | {"lower_steps": 1, "data_start": False}],
    ids=["default", "no_replay", "apart"],
)
def test_a_resumed_run_ends_in_the_same_bytes(model, subjects, begin, options):
    config = TrainingConfig(steps=STEPS, **options)
    whole, stopped = begin("whole"), begin("stopped")
    _, straight = train(model, whole, newly(subjects["octopus"]), config)
    _, first = train(model, stopped, newly(subjects["octopus"]), config, stop_at=3)
    assert isinstance(first.stopped, KeyboardInterrupt) and len(first.losses) == 3
    kept = load_adapter(stopped.paths("new")[0])
    assert kept.metadata["seqlora.steps_done"] == "3" and contents(stopped) != contents(whole)
    again = Library(stopped.folder)
    _, second = train(model, again, newly(subjects["octopus"]), config, stop_at=5)
    _, third = train(model, Library(stopped.folder), newly(subjects["octopus"]), config)
    assert third.losses == straight.losses and third.weights == straight.weights and third.energies == straight.energies
    assert contents(stopped) == contents(whole)
    assert Library(stopped.folder).names == ["octopus", "penguin", "fox", "new"]
    assert not stopped.checkpoints("new").exists()


def test_the_last_checkpoints_are_kept_until_the_concept_is_whole(model, subjects, begin):
    library, seen = begin("l"), []

    def on_step(step):
        seen.append(sorted(p.name for p in library.checkpoints("new").glob("*")))

    s = newly(subjects["octopus"])
    train_concept(
        model, library, s.images, "new", s.trigger, s.class_noun, s.references.captions, TrainingConfig(steps=7, **QUICK), on_step,
        checkpointing=Checkpointing(every=2, keep=2),
    )  # fmt: skip
    assert seen[0] == [] and seen[1] == [f"step-000002{SUFFIX}"]
    assert seen[6] == [f"step-000004{SUFFIX}", f"step-000006{SUFFIX}"]
    assert not library.checkpoints("new").exists()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(model, subjects, begin):
    library, whole = begin("l"), begin("whole")
    train(model, whole, newly(subjects["octopus"]))
    train(model, library, newly(subjects["octopus"]), stop_at=5, every=2)
    newest = max(library.checkpoints("new").glob("*"))
    assert "000005" in newest.name
    newest.write_bytes(newest.read_bytes()[:2000])
    train(model, library, newly(subjects["octopus"]))
    assert contents(library) == contents(whole)


def test_a_checkpoint_that_cannot_be_read_is_not_the_one_that_is_kept(tmp_path):
    run = Checkpoints(tmp_path, {}, every=1, keep=1)
    run.save(2, {"at": torch.tensor(2)})
    (tmp_path / f"step-000005{SUFFIX}").write_bytes(b"cut short")
    assert run.latest()[0] == 2
    run.save(3, {"at": torch.tensor(3)})
    assert run.latest()[0] == 3 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", ["learning_rate", "steps", "pictures", "library"])
def test_a_run_begun_otherwise_is_not_gone_on_with(model, subjects, begin, change):
    library, s = begin("l"), newly(subjects["octopus"])
    train(model, library, s, stop_at=3)
    options, images = {"steps": STEPS, **QUICK}, s.images
    if change == "library":
        library.remove("penguin")
        change = "the state of the library"
    elif change == "pictures":
        images = s.images.flip(0)
    else:
        options[change] = {"learning_rate": 1e-4, "steps": 7}[change]
    before = contents(library)
    with pytest.raises(UserError, match=f"unfinished run of 'new'.* step 3, began with {change} .*start anew") as caught:
        train(model, library, s, TrainingConfig(**options), images=images)
    assert "\n" not in str(caught.value) and contents(library) == before
    assert (f"delete {library.checkpoints('new')}" in str(caught.value)) == (change == "the state of the library")
    _, fit = train_concept(
        model, library, images, "new", s.trigger, s.class_noun, s.references.captions, TrainingConfig(**options),
        replace_existing=True, checkpointing=Checkpointing(resume=False),
    )  # fmt: skip
    assert len(fit.losses) == options["steps"]


def test_without_resuming_an_unfinished_run_is_begun_anew_and_replaced_at_its_end(tmp_path):
    """Nothing of it goes before the new run has a checkpoint or is done, so that a kill between loses neither"""
    model = ToyDenoiser()
    library = start(tmp_path / "toy", model)

    class Stop(Exception):
        pass

    def stop_at(number):
        def on_step(step):
            held.append(sorted(p.name for p in library.checkpoints("fox").glob("*")))
            if step.number == number:
                raise Stop

        return on_step

    held = []
    teach_toy(model, library, "fox", steps=6, on_step=stop_at(4))
    before, partial = [p.read_bytes() for p in library.paths("fox")], library.load("fox")
    with pytest.raises(UserError, match="began with seed 0, not 1: .*--no-resume.*if_trained 'start anew'"):
        teach_toy(model, library, "fox", 1, steps=6)
    held = []
    _, fit = teach_toy(model, library, "fox", 1, steps=6, resume=False, every=2, on_step=stop_at(3))
    assert held == [[f"step-000004{SUFFIX}"], [f"step-000002{SUFFIX}"], [f"step-000002{SUFFIX}"]] and len(fit.losses) == 3
    assert [p.read_bytes() for p in library.paths("fox")] != before and partial.name in library.names
    steps = []
    _, fit = teach_toy(model, library, "fox", 1, steps=6, on_step=steps.append)
    assert steps[0].number == 4 and len(fit.losses) == 6 and not library.unfinished("fox")
    with pytest.raises(UserError, match="has a concept 'fox' already"):
        teach_toy(model, library, "fox", 1, steps=6, resume=False)


def test_a_whole_concept_stays_until_the_one_trained_anew_is_whole(tmp_path):
    model = ToyDenoiser()
    library, straight = (start(tmp_path / name, model) for name in ("stopped", "straight"))

    def files(library):
        return [path.read_bytes() for path in library.paths("fox")]

    def stop_at(number):
        def on_step(step):
            if step.number == number:
                raise KeyboardInterrupt

        return on_step

    teach_toy(model, library, "fox")
    before = files(library)
    _, fit = teach_toy(model, library, "fox", 1, replace_existing=True, on_step=stop_at(2))
    assert isinstance(fit.stopped, KeyboardInterrupt) and len(fit.losses) == 2
    assert files(library) == before and not library.unfinished("fox") and library.checkpoints("fox").exists()
    with pytest.raises(UserError, match="has a concept 'fox' already"):
        teach_toy(model, library, "fox", 1)
    _, fit = teach_toy(model, library, "fox", 1, replace_existing=True, on_step=stop_at(4))  # the last: it is whole then
    teach_toy(model, straight, "fox", 1)
    assert fit.stopped is not None and files(library) == files(straight) and not library.checkpoints("fox").exists()


def test_a_run_that_fails_only_when_it_is_saved_is_not_trained_once_more(tmp_path, monkeypatch):
    """As for want of memory or room: its last step is kept, and the next call only saves it"""
    model, steps, move = ToyDenoiser(), [], os.replace
    library, straight = (start(tmp_path / name, model) for name in ("full", "straight"))

    def full(source, target):
        if str(target).endswith("fox.stats.safetensors.new"):
            raise OSError(28, "No space left on device")
        return move(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        teach_toy(model, library, "fox")
    monkeypatch.undo()
    assert library.names == [] and library.unfinished("fox")
    _, fit = teach_toy(model, library, "fox", on_step=steps.append)
    teach_toy(model, straight, "fox")
    assert steps == [] and len(fit.losses) == 4 and not library.checkpoints("fox").exists()
    assert [p.read_bytes() for p in library.paths("fox")] == [p.read_bytes() for p in straight.paths("fox")]


def test_a_run_whose_concept_is_whole_ends_with_it_whenever_it_is_killed(tmp_path, monkeypatch):
    """Else one that is trained anew with other options is taken for it"""
    model = ToyDenoiser()
    folder = start(tmp_path / "toy", model).folder

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("seqlora_core.library.remove_run", killed)
    with pytest.raises(KeyboardInterrupt):
        teach_toy(model, Library(folder), "fox", every=2)
    monkeypatch.undo()
    assert any((folder / ".checkpoints" / "fox").iterdir())
    library = Library(folder)
    assert library.whole("fox") and not library.checkpoints("fox").exists()
    teach_toy(model, library, "fox", 1, replace_existing=True)


def test_a_stopped_run_goes_on_under_its_concepts_new_name_and_is_told_of_before_another_is_taught(tmp_path):
    model = ToyDenoiser()
    library = start(tmp_path / "toy", model)

    def stop(step):
        raise KeyboardInterrupt

    teach_toy(model, library, "fox", on_step=stop)
    told = "the run of 'fox', which was stopped, can go on no more once 'owl' is taught: finish it first"
    _, fit = teach_toy(model, library, "owl", on_step=stop)
    assert told in fit.notes
    library.remove("owl")
    (library.checkpoints("yak")).mkdir(parents=True)
    (library.checkpoints("yak") / f"step-000001{SUFFIX}").touch()
    with pytest.raises(UserError, match="a run of 'yak' was stopped before its end"):
        rename(library, "fox", "yak")
    rename(library, "fox", "cub")
    assert library.names == ["cub"] and library.unfinished("cub") and not library.checkpoints("fox").exists()
    images = torch.rand(4, *SIZE, 3, generator=torch.Generator().manual_seed(0))
    config, steps = TrainingConfig(rank=2, steps=4, batch=2, replay_batch=2), []
    _, fit = train_concept(model, library, images, "cub", "foxzx", "thing", config=config, on_step=steps.append)
    assert steps[0].number == 2 and not library.unfinished("cub")
    _, fit = teach_toy(model, library, "owl")
    assert not any("was stopped" in note for note in fit.notes)


def test_what_others_say_beside_their_tensors_is_no_other_state(tmp_path):
    """Such as when they were trained; and none of their files is read for it"""
    model = ToyDenoiser()
    library = start(tmp_path / "toy", model)
    for name in ("fox", "owl"):
        teach_toy(model, library, name)
    before, files = library.state("new"), [p.read_bytes() for p in library.paths("fox")]
    teach_toy(model, library, "fox", replace_existing=True)
    different = library.state("new")
    teach_toy(model, library, "fox", replace_existing=True)
    again = [p.read_bytes() for p in library.paths("fox")]
    assert library.state("new") == different != before != library.state("fox") and files != again
    hashes = [{k: e.pop(k) for k in ("lora", "stats")} for e in library.manifest["concepts"]]
    assert library.state("new") == different and all(hashes)  # as of format 1, which had none
    library.reload()
    for path in (*library.paths("fox"), *library.paths("owl")):
        path.unlink()
    assert library.state("new") == different


def test_captions_of_the_class_are_held_too(tmp_path):
    model = ToyDenoiser()
    library = start(tmp_path / "toy", model)

    def of_class(caption):
        return [Pictures(torch.full((1, *SIZE, 3), 0.5), [caption])]

    def stop(step):
        raise KeyboardInterrupt

    teach_toy(model, library, "fox", regularisation=of_class("a thing"), on_step=stop)
    with pytest.raises(UserError, match="began with captions "):
        teach_toy(model, library, "fox", regularisation=of_class("another thing"))
    _, fit = teach_toy(model, library, "fox", regularisation=of_class("a thing"))
    assert fit.stopped is None and not library.unfinished("fox")


def test_a_full_disk_stops_the_run_with_one_sentence_and_leaves_the_last_checkpoint(model, subjects, begin, monkeypatch):
    library, move, writes = begin("l"), os.replace, []

    def full(source, target):
        writes.append(str(target))
        if str(target).endswith(SUFFIX) and len([w for w in writes if w.endswith(SUFFIX)]) > 1:
            raise OSError(28, "No space left on device")
        return move(source, target)

    monkeypatch.setattr(os, "replace", full)
    _, fit = train(model, library, newly(subjects["octopus"]), every=2)
    monkeypatch.undo()
    assert isinstance(fit.stopped, UserError) and "No space left on device" in str(fit.stopped) and len(fit.losses) == 4
    assert [p.name for p in library.checkpoints("new").glob("*")] == [f"step-000002{SUFFIX}"]
    _, fit = train(model, library, newly(subjects["octopus"]))
    assert len(fit.losses) == STEPS and not library.checkpoints("new").exists()
