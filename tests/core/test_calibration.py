"""What a base model sees is recorded once: a new library takes it over from one beside it that was begun alike."""

from dataclasses import replace

import pytest
import torch

from seqlora_core.calibration import FILE, PASSES, Calibration, calibrate, record_moments, watched
from seqlora_core.captions import Prompts
from seqlora_core.concept import References
from seqlora_core.config import TrainingConfig
from seqlora_core.drawing import Visited, draw
from seqlora_core.errors import UserError
from seqlora_core.library import Library
from seqlora_core.prompts import generic_decoys, generic_prompts, is_decoy
from seqlora_core.teach import train_concept
from seqlora_core.trainer import _moments

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


def test_what_was_visited_is_kept_and_a_calibration_without_it_is_read_as_ever(tmp_path):
    denoiser = ToyDenoiser()
    library = begin(tmp_path / "l", denoiser)
    held, path = library.calibration(), tmp_path / "c.safetensors"
    assert held.visited.leads_to(held.latents)
    held.save(path, denoiser.fingerprint())
    assert all(torch.equal(a, b) for a, b in zip(Calibration.load(path).visited, held.visited))
    replace(held, visited=None).save(path, denoiser.fingerprint())
    assert Calibration.load(path).visited is None
    replace(held, visited=Visited(*(part[1:] for part in held.visited))).save(path, denoiser.fingerprint())
    with pytest.raises(UserError, match="is no calibration, or a damaged one"):
        Calibration.load(path)


@pytest.mark.parametrize("count", [1, 2, 14])
def test_pictures_that_the_budget_looks_at_are_unknown_to_the_moments(count):
    """Else the energy would hold them still, and a concept would move everything else further than the budget believes"""
    denoiser, prompts = ToyDenoiser(), generic_prompts(count) + generic_decoys(count // 2)
    made, apart = calibrate(denoiser, SIZE, prompts=prompts), watched(prompts)
    others = [i for i in range(len(prompts)) if i not in apart] or apart
    alone = draw(denoiser, [prompts[i] for i in others], 0, SIZE)
    assert apart and not any(is_decoy(prompts[i]) for i in apart)
    assert torch.equal(made.latents[others], alone.latents) and len(made.latents) == len(prompts)
    assert all(torch.equal(part[others], own) for part, own in zip(made.visited, alone.visited))
    assert all(torch.equal(made.moments[n], alone.moments[n]) for n in alone.moments.layers)
    assert made.visited.leads_to(made.latents)
    if len(prompts) > len(apart):
        unseen = draw(denoiser, [prompts[i] for i in apart], 1, SIZE)
        assert torch.equal(made.latents[apart], unseen.latents)


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


def test_a_concepts_inputs_are_seen_at_every_level_and_each_size_of_picture_by_its_area():
    denoiser, asked = ToyDenoiser(), []
    predict = denoiser.predict
    denoiser.predict = lambda *inputs: asked.append(inputs[1]) or predict(*inputs)
    noise = torch.Generator().manual_seed(0)
    sets = [
        References(torch.randn(count, 4, 2, width, generator=noise), ["an octzu"] * count, (16, 8 * width))
        for count, width in ((3, 2), (1, 5))
    ]
    prompts = [Prompts(denoiser, s.captions, "octzu", TrainingConfig()) for s in sets]
    first, second = (record_moments(denoiser, s.latents, p.plain) for s, p in zip(sets, prompts))
    assert torch.equal(torch.cat(asked[:PASSES]).sort().values, denoiser.even_sigmas(3 * PASSES))
    found, layer = _moments(denoiser, sets, prompts, None, 0), denoiser.sites()[1].name
    assert torch.allclose(found[layer], (3 * 4 * first[layer] + 10 * second[layer]) / 22)
