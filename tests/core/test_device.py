"""All that a model does away from main memory: on a device that is pretended, and on a GPU where there is one."""

import pytest
import torch
from torch import nn

from seqlora_core import linalg, replay, statistics
from seqlora_core.calibration import calibrate
from seqlora_core.concept import References
from seqlora_core.config import Checkpointing, TrainingConfig
from seqlora_core.demo import load_subject
from seqlora_core.demo_model import DemoModel, encode_text
from seqlora_core.denoiser import Conditioning
from seqlora_core.evaluation import HeldOut, measure, summed
from seqlora_core.library import Library
from seqlora_core.lora_moments import see_trigger
from seqlora_core.ordinary import train_ordinary
from seqlora_core.pictures import Pictures
from seqlora_core.preview import Preview, sample_sheet
from seqlora_core.teach import train_concept
from seqlora_core.transformer_model import TransformerModel
from seqlora_core.unet_model import UNetModel

from .pretended_device import pretended_device

SIZE = (64, 64)
SMALL = dict(steps=2, batch=2, replay_batch=4)


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "pretended":
        monkeypatch.setattr(linalg, "UNFACTORED", ("meta",))
        with pretended_device(small=True) as found:
            yield found
    elif torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        pytest.skip("no GPU")


def test_the_pretended_device_refuses_what_a_gpu_refuses():
    here, generator = torch.ones(2, 2), torch.Generator().manual_seed(0)
    with pretended_device(small=True) as device:
        there = here.to(device)
        assert there.device == device and there[torch.tensor([1])].sum().item() == 2 and (there @ there * 2).cpu().sum() == 16
        for wrong in (
            lambda: here @ there,
            lambda: torch.cat([here, there]),
            lambda: here[there.long()],
            lambda: there.numpy(),
            lambda: there.double(),
            lambda: torch.linalg.qr(there),
            lambda: torch.randn(2, generator=generator, device=device),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()


@pytest.fixture(autouse=True)
def few_decoys(monkeypatch):
    monkeypatch.setattr(replay, "decoy_count", lambda size: 3)


def two_concepts(model, folder, pictures, size=SIZE, drawn=False, **options):
    """A library of two, the second with the first beside it; the second's fit.  drawn: and pictures of both meanwhile"""
    given = {k: options.pop(k) for k in ("regularisation", "checkpointing") if k in options}
    config = TrainingConfig(**SMALL, **options)
    library = Library(folder, model.fingerprint(), 4, create=True)
    model.adapt_text(config.text_encoder, tokens=config.learn_trigger)
    library.keep_calibration(calibrate(model, size, 6))
    for name, trigger in (("a", "octzu"), ("b", "qwfpz")):
        preview = Preview(model, trigger, "thing", library.concepts(), size)

        def on_step(step, preview=preview):
            if drawn and step.number == 1:
                preview.draw("step 1", step.snapshot())

        fit = train_concept(model, library, pictures, name, trigger, "thing", config=config, on_step=on_step, **given)[1]
        assert fit.stopped is None and not preview.failed
    if drawn:
        assert sample_sheet(model, library, "b", pictures).isfinite().all()
    assert all(d.down.device.type == d.up.device.type == "cpu" for d in fit.adapter.layers.values())
    return fit


def of_sizes():
    generator = torch.Generator().manual_seed(0)
    square, wide = torch.rand(2, *SIZE, 3, generator=generator), torch.rand(1, 64, 96, 3, generator=generator)
    return [Pictures(square, [None] * 2, masks=torch.rand(2, *SIZE, generator=generator)), Pictures(wide, [None])]


CASES = {
    "a text encoder, a learnt trigger": dict(text_encoder=True, learn_trigger=True, gradient_checkpointing=True),
    "levels apart": dict(lower_steps=1, hypergradient="cg:2"),
    "a line search": dict(lower_steps=1, line_search=True, retraction="polar", accumulate=2, clip=1.0),
    "masks, sizes, pictures of the class": dict(regularisation=of_sizes(), checkpointing=Checkpointing(every=1)),
    "nothing of ours": dict(whitened=False, data_start=False, orthogonal=False, replay_target="before"),
}


@pytest.mark.parametrize("case", CASES)
def test_all_that_a_concept_may_be_trained_with(case, device, tmp_path):
    pictures = of_sizes() if "sizes" in case else of_sizes()[0].images
    assert torch.tensor(two_concepts(DemoModel(device=device), tmp_path / "l", pictures, **CASES[case]).losses).isfinite().all()


def test_what_is_trained_there_is_what_is_trained_here(device, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "SKETCH_FROM", 100)  # some layers' moments are matrices, others' sketches
    pictures, fits = of_sizes()[0].images, []
    for model in (DemoModel(device=device), DemoModel()):
        fits.append(two_concepts(model, tmp_path / str(model.device), pictures, learn_trigger=True, rank_energy=0.8))
    there, here = fits
    assert there.losses == pytest.approx(here.losses, rel=1e-3)
    assert there.energies == pytest.approx(here.energies, rel=1e-2, abs=1e-9)


def test_a_run_that_was_stopped_goes_on_there(device, tmp_path):
    model, pictures = DemoModel(device=device), of_sizes()[0].images

    def losses(folder, *stops):
        library = Library(tmp_path / folder, model.fingerprint(), 4, create=True)
        model.adapt_text(False, tokens=True)
        if library.calibration() is None:
            library.keep_calibration(calibrate(model, SIZE, 6))

        def on_step(step):
            if step.number in stops:
                raise KeyboardInterrupt

        config = TrainingConfig(**SMALL | dict(steps=3), learn_trigger=True)
        return train_concept(model, library, pictures, "a", "octzu", "thing", config=config, on_step=on_step)[1].losses

    assert len(losses("stopped", 2)) == 2
    assert losses("stopped") == pytest.approx(losses("whole"), rel=1e-3)


class TextInMainMemory(DemoModel):
    """As ComfyUI has it on small cards"""

    def __init__(self, device):
        super().__init__(device=device)
        self.text = nn.Module.to(self.text, "cpu")

    def read_prompts(self, prompts):
        context, pooled = encode_text(self.text, self.tokenize(prompts))
        return Conditioning(context.to(self.device), pooled.to(self.device))


def test_a_text_encoder_that_stays_in_main_memory_is_trained_from_there(device, tmp_path):
    pictures = of_sizes()[0].images
    fit = two_concepts(TextInMainMemory(device), tmp_path / "l", pictures, text_encoder=True, learn_trigger=True)
    assert all(delta.up.any() for delta in fit.adapter.layers.values())


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_models_in_diffusers(kind, device, tmp_path):
    from benchmarks.tiny import make_pipeline

    pipeline = make_pipeline(kind)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, device)
    model = (TransformerModel if kind == "sd3" else UNetModel)(pipeline)
    size = (model.size,) * 2
    pictures = torch.rand(2, *size, 3, generator=torch.Generator().manual_seed(0))
    fit = two_concepts(model, tmp_path / "l", pictures, size, drawn=kind == "sd15")
    assert torch.tensor(fit.losses).isfinite().all()


def test_ordinary_loras_and_what_is_measured_of_them(device):
    """To a thousandth what is measured in main memory"""
    subject = load_subject(DemoModel(), "octopus")

    def found(model):
        model.adapt_text(False)
        latents, captions = subject.references.latents, subject.references.captions
        references = References(latents, captions, SIZE)
        adapters = [train_ordinary(model, references, 2, 2, 1e-3, seed=seed) for seed in range(2)]
        held_outs = [HeldOut.of(model, latents[i : i + 1], captions[i : i + 1], levels=2) for i in range(2)]
        losses = measure(model, adapters, summed(adapters), held_outs, held_outs[0], [(0, 1, held_outs[1])])
        moments = see_trigger(model, adapters[0], "octzu", SIZE, 2).layers.values()
        assert {m.device.type for m in moments} == {"cpu"}
        return [*losses.alone, *losses.stack, losses.generic, losses.pairs, *(float(m.trace()) for m in moments)]

    assert found(DemoModel(device=device)) == pytest.approx(found(DemoModel()), rel=1e-3)
