"""Drawing and recording at once: the steps are the libraries' own, and the moments those of what the layers were given."""

import diffusers
import pytest
import torch

from seqlora_core.drawing import UNGUIDED, draw, foreseen
from seqlora_core.errors import UserError

from ..reliability.toy import CHANNELS, SIZE, ToyDenoiser

STEPS, PROMPTS = 4, ["a fox", "an owl on a tree", "a house"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_step_is_that_of_diffusers_ddim(kind):
    from benchmarks.tiny import make_pipeline
    from seqlora_core.unet_model import UNetModel

    pipeline = make_pipeline("sd15")
    pipeline.scheduler.register_to_config(prediction_type=kind)
    denoiser = UNetModel(pipeline)
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(8)
    x, prediction = torch.randn(2, 1, 4, 8, 8, generator=generator())
    now, later = torch.tensor([600]), torch.tensor([600 - 125])
    latents, noise = foreseen(denoiser, x, prediction, now)
    step = scheduler.step(prediction, 600, x, eta=0.0)
    assert torch.allclose(latents, step.pred_original_sample, rtol=1e-4, atol=1e-5)
    assert torch.allclose(denoiser.noised(latents, noise, later), step.prev_sample, rtol=1e-4, atol=1e-5)


def test_a_step_of_a_flow_model_is_eulers():
    denoiser, scheduler = ToyDenoiser(), diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.9, 0.35])
    x, prediction = torch.randn(2, 3, CHANNELS, 2, 2, generator=generator())
    latents, noise = foreseen(denoiser, x, prediction, torch.full((3,), 0.9))
    stepped = scheduler.step(prediction, scheduler.timesteps[0], x, return_dict=False)[0]
    assert torch.allclose(denoiser.noised(latents, noise, torch.full((3,), 0.35)), stepped, atol=1e-5)


class Watched(ToyDenoiser):
    """Remembers what it was asked, and what its first layer was given"""

    def __init__(self):
        super().__init__()
        self.asked, self.given = [], []
        self.layers[0].register_forward_pre_hook(lambda _, inputs: self.given.append(inputs[0].detach()))

    def predict(self, noised, sigma, conditioning):
        self.asked.append((noised, sigma, conditioning.context))
        return super().predict(noised, sigma, conditioning)


@pytest.mark.parametrize("guidance", [UNGUIDED, 3.0])
def test_moments_are_of_the_inputs_at_the_training_levels_with_the_prompt(guidance):
    denoiser = Watched()
    moments = draw(denoiser, PROMPTS, 5, SIZE, guidance=guidance, steps=STEPS).moments
    passes = denoiser.given if guidance == UNGUIDED else denoiser.given[::2]
    assert len(denoiser.given) == (STEPS + 1) * (1 if guidance == UNGUIDED else 2)
    rows = torch.cat([x.flatten(0, 1) for x in passes[1:]]).double()  # not of pure noise
    name = denoiser.sites()[0].name
    assert torch.allclose(moments[name].double(), rows.mT @ rows / len(rows), rtol=1e-5)


def test_each_picture_is_seen_once_in_each_part_of_the_schedule():
    denoiser = Watched()
    draw(denoiser, PROMPTS, 5, SIZE, steps=STEPS)
    sigmas = torch.stack([sigma for _, sigma, _ in denoiser.asked])
    assert (sigmas[0] == 1).all() and (sigmas[1:] < sigmas[:-1]).all()
    assert torch.equal(sigmas[1:].flatten().sort().values, denoiser.even_sigmas(len(PROMPTS) * STEPS))


@pytest.mark.parametrize("guidance", [UNGUIDED, 3.0])
def test_what_is_visited_is_what_was_asked_with_the_prompt_and_what_was_said(guidance):
    denoiser = Watched()
    drawn = draw(denoiser, PROMPTS, 5, SIZE, guidance=guidance, steps=STEPS)
    asked = denoiser.asked[:: 1 if guidance == UNGUIDED else 2][1:]  # not pure noise
    x, sigma, said = drawn.visited
    assert drawn.visited.leads_to(drawn.latents) and not drawn.visited.leads_to(drawn.latents[:2])
    with torch.no_grad():
        for step, inputs in enumerate(asked):
            assert torch.allclose(x[:, step].float(), inputs[0], rtol=1e-3) and torch.equal(sigma[:, step], inputs[1])
            expected = ToyDenoiser.predict(denoiser, inputs[0], inputs[1], denoiser.encode_prompts(PROMPTS))
            assert torch.allclose(said[:, step].float(), expected, rtol=1e-3, atol=1e-6)


def test_what_half_precision_cannot_hold_is_kept_whole():
    denoiser = ToyDenoiser()
    denoiser.predict = lambda noised, *_: torch.full_like(noised, 1e6)
    x, _, said = draw(denoiser, PROMPTS, 5, SIZE, steps=STEPS).visited
    assert (said == 1e6).all() and x.isfinite().all()


def test_pictures_that_are_not_finite_are_told():
    denoiser = ToyDenoiser()
    denoiser.predict = lambda noised, *_: noised * torch.nan
    with pytest.raises(UserError, match="what the model draws is not finite"):
        draw(denoiser, PROMPTS, 5, SIZE, steps=STEPS)


def test_guidance_moves_away_from_the_empty_prompt():
    denoiser = Watched()
    draw(denoiser, PROMPTS, 5, SIZE, guidance=3.0, steps=STEPS)
    (x, sigma, wanted), (same, _, unwanted) = denoiser.asked[:2]
    assert torch.equal(x, same) and not unwanted.any()
    with torch.no_grad():
        a, b = (ToyDenoiser.predict(denoiser, x, sigma, denoiser.encode_prompts(p)) for p in (PROMPTS, [""] * 3))
    following, later = denoiser.asked[2][:2]
    assert torch.allclose(following, denoiser.noised(*foreseen(denoiser, x, b + 3 * (a - b), sigma), later), atol=1e-5)


def test_drawings_are_of_the_models_own_distribution_and_of_their_seed(model):
    """The demo model foresees its own drawings about as well as real pictures: they are of its distribution"""
    from seqlora_core.demo import load_generic
    from seqlora_core.evaluation import HeldOut, held_out_loss
    from seqlora_core.prompts import generic_prompts

    prompts = generic_prompts(24, seed=3)
    latents = draw(model, prompts, 1, (64, 64)).latents
    assert torch.equal(latents, draw(model, prompts, 1, (64, 64)).latents)
    own = held_out_loss(model, HeldOut.of(model, latents, prompts, levels=4))
    mixed = held_out_loss(model, HeldOut.of(model, latents.flip(0), prompts, levels=4))
    real = held_out_loss(model, load_generic(model))
    assert 0.5 * real < own < 1.2 * real and own < 0.9 * mixed
