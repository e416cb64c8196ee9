import pytest

from seqlora_core.config import TrainingConfig
from seqlora_core.demo import load_subject
from seqlora_core.library import Library
from seqlora_core.teach import train_concept

NAMES = ("octopus", "penguin", "fox")


@pytest.fixture(scope="session")
def subjects(model):
    return {name: load_subject(model, name) for name in NAMES}


def teach(model, library, subject, steps=12, batch=4, replay_batch=6, on_step=None, **options):
    """With half of the usual pictures a step, so that the tests take half of the time"""
    config = TrainingConfig(steps=steps, batch=batch, replay_batch=replay_batch, **options)
    return train_concept(
        model, library, subject.images, subject.name, subject.trigger, subject.class_noun,
        subject.references.captions, config, on_step,
    )  # fmt: skip


@pytest.fixture(scope="session")
def new_library(model, calibration):
    """Function that starts a library in a folder, calibrated already."""

    def make(folder, **options):
        library = Library(folder, model.fingerprint(), create=True, **options)
        library.keep_calibration(calibration)
        return library

    return make


@pytest.fixture(scope="session")
def library(model, subjects, new_library, tmp_path_factory):
    """Three concepts, trained a little, one after another.  Read only."""
    library = new_library(tmp_path_factory.mktemp("libraries") / "trio")
    for subject in subjects.values():
        teach(model, library, subject)
    return library
