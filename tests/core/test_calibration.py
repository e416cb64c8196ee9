"""What a base model sees is recorded once: a new library takes it over from one beside it that was begun alike."""

import pytest
import torch

from seqlora_core.calibration import FILE, Calibration
from seqlora_core.config import TrainingConfig
from seqlora_core.library import Library
from seqlora_core.teach import train_concept

from ..reliability.toy import SIZE, ToyDenoiser


def begin(folder, denoiser, steps=2, size=SIZE):
    library = Library(folder, denoiser.fingerprint(), 4, create=True)
    images = torch.rand(2, *size, 3, generator=torch.Generator().manual_seed(0))
    train_concept(denoiser, library, images, "thing", "octzu", config=TrainingConfig(steps=steps, batch=2, replay_batch=4))
    return library


@pytest.fixture
def counted(monkeypatch):
    """Calls of calibrate, which is what takes long"""
    from seqlora_core import teach

    calls, original = [], teach.calibrate

    def calibrate(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(teach, "calibrate", calibrate)
    return calls


def test_a_library_beside_it_is_asked_first(tmp_path, counted):
    denoiser = ToyDenoiser()
    first, second = (begin(tmp_path / name, denoiser) for name in ("first", "second"))
    assert len(counted) == 1
    assert (first.folder / FILE).read_bytes() == (second.folder / FILE).read_bytes()
    assert first.paths("thing")[0].read_bytes() == second.paths("thing")[0].read_bytes()


def test_not_of_another_base_or_another_size(tmp_path, counted):
    denoiser, other = ToyDenoiser(), ToyDenoiser()
    other.layers[0].weight += 1
    begin(tmp_path / "first", denoiser)
    begin(tmp_path / "second", other)
    begin(tmp_path / "third", denoiser, size=(32, 16))
    begin(tmp_path / "elsewhere" / "fourth", denoiser)
    assert len(counted) == 4


def test_one_with_prompts_of_its_own_or_a_damaged_one_is_no_ones_but_its_librarys(tmp_path, counted):
    denoiser = ToyDenoiser()
    first = begin(tmp_path / "first", denoiser)
    held = Calibration.load(first.folder / FILE)
    held.made = ""
    first.keep_calibration(held)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / FILE).write_bytes((first.folder / FILE).read_bytes()[:100])
    begin(tmp_path / "second", denoiser)
    assert len(counted) == 2
