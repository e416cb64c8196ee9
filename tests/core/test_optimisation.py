"""Optimisers, schedules, noise levels and weights, against the libraries and formulas they come from."""

import pytest
import torch

from seqlora_core.attach import Attachment, attached
from seqlora_core.captions import Prompts, shuffled
from seqlora_core.concept import latent_weights
from seqlora_core.config import TrainingConfig
from seqlora_core.errors import UserError
from seqlora_core.noise_levels import draw_sigmas, min_snr_weights, signal_to_noise
from seqlora_core.optimisers import OPTIMISERS, SCHEDULES, course, gradients, make_optimiser, schedule
from seqlora_core.ordinary import train_ordinary
from seqlora_core.recompute import blocks_of, recomputed

from .conftest import teach
from .test_objective import objective_of

QUICK = {"use_decoys": False, "replay_batch": 4, "batch": 2}


@pytest.mark.parametrize("name, theirs", [("constant", "constant"), ("linear", "linear"), ("cosine", "cosine")])
def test_schedules_are_diffusers_schedules(name, theirs):
    from diffusers.optimization import get_scheduler

    optimiser = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(theirs, optimiser, num_warmup_steps=0, num_training_steps=50)
    expected = [scheduler.lr_lambdas[0](n) for n in range(50)]
    assert course(name, 50) == pytest.approx(expected, abs=1e-6)


def test_the_default_course_is_the_one_of_the_figures_and_warmup_rises_before_it():
    assert course("half", 320) == [schedule(n, 320) for n in range(1, 321)]
    warm = course("cosine", 30, warmup=4)
    assert warm[:4] == [0.2, 0.4, 0.6, 0.8] and warm[4] == 1.0 and warm[4:] == course("cosine", 26)
    assert all(min(course(name, 20)) > 0 for name in SCHEDULES)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_lower_a_quadratic_or_say_what_they_need(name):
    target, x = torch.tensor([1.0, -2.0]), torch.zeros(2, requires_grad=True)
    try:
        optimiser = make_optimiser(name, [x], 1.0 if name == "prodigy" else 0.05)
    except UserError as error:
        assert "needs the package" in str(error) and name in str(error)
        return
    for _ in range(60):
        optimiser.zero_grad()
        (x - target).square().sum().backward()
        optimiser.step()
    assert (x - target).square().sum() < 4.0


def test_gradients_through_half_precision_are_not_rounded_away():
    """Of a mean over many elements, what reaches each one is less than float16 has numbers for"""
    factor, unused, count = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True), 1 << 16
    tries = []

    def value(dtype, louder=1.0):
        tries.append(louder)
        seen = (factor * torch.ones(count)).to(dtype) * louder
        return (seen.float() - louder * (1 - 2**-11)).square().mean()

    whole, rounded = (torch.autograd.grad(value(dtype), factor)[0] for dtype in (torch.float32, torch.float16))
    assert whole > 0 and rounded == 0
    found, none = gradients(lambda: value(torch.float16), [factor, unused], count)
    assert torch.allclose(found, whole, rtol=1e-3) and none is None
    assert torch.equal(gradients(lambda: value(torch.float32), [factor], count)[0], whole)  # to the bit
    tries.clear()
    (found,) = gradients(lambda: value(torch.float16, 32768.0), [factor], count)  # overflows at first
    assert torch.allclose(found, whole * 32768**2, rtol=1e-3) and len(tries) > 1
    assert not gradients(lambda: factor.sum() * torch.inf, [factor], count)[0].isfinite().all()


def test_what_trains_takes_its_gradients_so(model, subjects, calibration, monkeypatch):
    """The demo model's prediction through float16, at a size at which what is passed back would be rounded away"""
    s, config, predict = (
        subjects["octopus"].references,
        TrainingConfig(batch=2, use_decoys=False, replay_weight=0.0),
        model.predict,
    )
    found = []
    for half in (False, True):
        seen = (lambda *a: (predict(*a) * 4096).half().float() / 4096) if half else predict
        monkeypatch.setattr(model, "predict", seen)
        objective = objective_of(model, s, config, calibration)
        with attached(model.sites(), objective.attachment):
            objective.gradients(False)
        ordinary = train_ordinary(model, s, steps=1, batch=2).layers.values()
        found.append(
            [torch.cat([g.up.grad.flatten() for g in objective.groups]), torch.cat([d.up.flatten() for d in ordinary])]
        )
    for whole, rounded in zip(*found):
        assert (rounded - whole).norm() < 0.02 * whole.norm()


@pytest.mark.parametrize(
    "options",
    [{"optimiser": "prodigy", "learning_rate": 1.0}, {"optimiser": "sgd", "learning_rate": 0.5, "clip": 1.0}, {"accumulate": 2, "schedule": "cosine", "warmup": 1}],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_each_option_trains_and_resumes_exactly(model, subjects, new_library, tmp_path, options):
    if options.get("optimiser") == "prodigy":
        pytest.importorskip("prodigyopt")

    def stop(step):
        if step.number == 2:
            raise KeyboardInterrupt

    files = []
    for name in ("a", "b"):
        library = new_library(tmp_path / name)
        if name == "b":
            teach(model, library, subjects["octopus"], steps=4, **QUICK, **options, on_step=stop)
        _, fit = teach(model, library, subjects["octopus"], steps=4, **QUICK, **options)
        files.append(library.paths("octopus")[0].read_bytes())
    assert files[0] == files[1] and len(fit.losses) == 4


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(model, subjects):
    """Bytes that autograd saves, counted by its own hooks."""
    s = subjects["octopus"]
    blocks = blocks_of(model.network(), model.sites())
    assert len(blocks) == len(model.mmdit.transformer_blocks)
    layers = {
        site.name: (torch.randn(2, site.in_features).requires_grad_(), torch.randn(site.out_features, 2).requires_grad_())
        for site in model.sites()
    }
    attachment = Attachment()
    attachment.live = layers
    prompts = model.encode_prompts(["an octzu animal"] * 2)
    found = []
    for memory in (False, True):
        saved = []

        def keep(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        import contextlib

        with (
            attached(model.sites(), attachment),
            recomputed(model.network(), model.sites()) if memory else contextlib.nullcontext(),
        ):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                value = model.predict(s.references.latents[:2], torch.tensor([0.3, 0.6]), prompts).square().mean()
            value.backward()
        found.append(
            (sum(saved), torch.cat([t.grad.flatten() for pair in layers.values() for t in pair if t.grad is not None]))
        )
        for pair in layers.values():
            for t in pair:
                t.grad = None
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-6) and found[1][0] < 0.5 * found[0][0]
    assert all("forward" not in b.__dict__ for b in blocks)


@pytest.fixture(scope="module")
def unet():
    from benchmarks.tiny import make_pipeline
    from seqlora_core.unet_model import UNetModel

    return UNetModel(make_pipeline("sd15"))


def test_min_snr_is_diffusers_signal_to_noise_clamped(unet):
    from diffusers.training_utils import compute_snr

    t = torch.tensor([5, 200, 600, 990])
    snr = compute_snr(unet.pipeline.scheduler, t)
    assert torch.allclose(signal_to_noise(unet, t), snr.float(), rtol=1e-3)
    assert torch.allclose(min_snr_weights(unet, t, 5.0), snr.clamp(max=5.0) / snr, rtol=1e-3)


def test_min_snr_is_refused_for_flow_models(model):
    with pytest.raises(UserError, match="min_snr is for models that predict noise or velocity"):
        min_snr_weights(model, torch.tensor([0.5]), 5.0)


def test_noise_levels_are_spread_as_they_say(model):
    def drawn(**options):
        return draw_sigmas(model, TrainingConfig(**options), 20_000, torch.Generator().manual_seed(0))

    assert torch.equal(drawn(), model.draw_sigmas(20_000, torch.Generator().manual_seed(0)))
    uniform, normal, shifted = (
        drawn(timesteps="uniform"),
        drawn(timesteps="logit_normal"),
        drawn(timesteps="shifted", shift=3.0),
    )
    assert uniform.mean() == pytest.approx(0.5, abs=0.01) and uniform.var() == pytest.approx(1 / 12, abs=0.003)
    assert normal.logit().std() == pytest.approx(1.0, abs=0.02)
    back = shifted / (3 - 2 * shifted)
    assert back.mean() == pytest.approx(0.5, abs=0.01) and shifted.mean() > 0.6


def test_tags_are_shuffled_behind_the_trigger_and_captions_dropped(model):
    import random

    texts = shuffled("red, a zqx cat, on a sofa, night", "zqx", 8, random.Random(0))
    assert texts[0] == "red, a zqx cat, on a sofa, night" and all(t.startswith("a zqx cat, ") for t in texts[1:])
    assert len(set(texts)) > 3 and all(sorted(t.split(", ")) == sorted(texts[0].split(", ")) for t in texts)
    texts = shuffled("red, a Zqx, cat on a sofa, night", "zqx, cat", 8, random.Random(0))
    assert {t.removeprefix("a Zqx, cat on a sofa, ") for t in texts[1:]} == {"red, night", "night, red"}
    assert {t.split(", ")[0] for t in shuffled("red fox, box, ox", "ox", 8, random.Random(0))[1:]} == {"ox"}
    plain = Prompts(model, ["a zqx cat", "a zqx dog"], "zqx", TrainingConfig())
    assert torch.equal(plain.draw(torch.tensor([1, 0]), None).context, plain.plain.context.flip(0))
    prompts = Prompts(model, ["a zqx cat, x", "a zqx dog, y"], "zqx", TrainingConfig(caption_dropout=0.3, shuffle_tags=True))
    assert torch.equal(prompts.plain.context, model.encode_prompts(["a zqx cat, x", "a zqx dog, y"]).context)
    drawn = prompts.draw(torch.zeros(4000, dtype=torch.long), torch.Generator().manual_seed(0))
    empty = (drawn.context == model.encode_prompts([""]).context).flatten(1).all(1)
    assert empty.float().mean() == pytest.approx(0.3, abs=0.03)


def test_masks_weight_the_latents_they_cover():
    masks = torch.zeros(2, 64, 64)
    masks[0, :, :32], masks[1] = 1.0, 0.25
    weights = latent_weights(masks, torch.zeros(2, 16, 8, 8))
    assert weights.shape == (2, 1, 8, 8) and torch.allclose(weights.mean((1, 2, 3)), torch.ones(2))
    assert weights[0, 0, :, :4].eq(2).all() and weights[0, 0, :, 4:].eq(0).all() and weights[1].eq(1).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optimiser": "magic"}, "optimiser is 'magic': use one of adam"), ({"schedule": "up"}, "schedule is 'up'"),
        ({"timesteps": "x"}, "timesteps is 'x'"), ({"warmup": 400}, "warmup is 400 of 320"), ({"accumulate": 0}, "accumulate is 0"),
        ({"clip": -1.0}, "clip is -1"), ({"caption_dropout": 1.0}, "caption_dropout is 1"), ({"min_snr": -1.0}, "min_snr is -1"),
        ({"optimiser": "prodigy"}, "prodigy finds the rate itself"), ({"shift": 0.0}, "shift is 0"),
        ({"gradient_checkpointing": True, "hypergradient": "cg:2", "lower_steps": 1}, "leave one of them out"),
        ({"learn_basis": False, "hypergradient": "cg:2", "lower_steps": 1}, "turn learn_basis on"),
        ({"line_search": True}, "give lower_steps"),
        ({"line_search": True, "lower_steps": 3, "hypergradient": "cg:2"}, "hypergradient none"),
    ],
)  # fmt: skip
def test_wrong_options_get_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        TrainingConfig(**options).validate()
