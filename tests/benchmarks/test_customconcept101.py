"""CustomConcept101's benchmark from end to end on random models and a data set of its layout; and the UNet host alone."""

import functools
import json

import pytest
import torch

from benchmarks import customconcept101, tiny
from seqlora_core.denoiser import Conditioning, loss
from seqlora_core.diffusers_folder import open_folder
from seqlora_core.errors import UserError
from seqlora_core.preview import draw_with


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for kind in ("sd15", "sdxl"):
        tiny.make_pipeline(kind).save_pretrained(folder / kind)
    tiny.make_judges(folder)
    tiny.make_data(folder / "data")
    return folder


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_whole_way(monkeypatch, folder, tmp_path, kind):
    monkeypatch.setattr(customconcept101, "draw_with", functools.partial(draw_with, steps=3))
    arguments = [
        "--model", folder / kind, "--data", folder / "data", "--clip", folder / "clip", "--dino", folder / "dino",
        "--output", tmp_path, "--count", 2, "--steps", 2, "--rates", 1e-3, "--levels", 2, "--generic", 3, "--pictures", 4,
        "--prompts", 1,
    ]  # fmt: skip
    rows = customconcept101.main([str(a) for a in arguments])
    assert [r["row"] for r in rows] == list(customconcept101.ROWS)
    written = json.loads((tmp_path / "customconcept101.json").read_text())
    assert written["rows"] == rows and written["meta"]["concepts"] == ["toy_octopus", "toy_penguin"]
    for row in rows:
        assert {"kept_mean", "generic_drift", "clip_t_stack", "clip_i_alone", "dino_stack"} <= set(row)
    assert [p.name.split("-")[0] for p in (tmp_path / "runs").iterdir()] == [open_folder(folder / kind).fingerprint()]
    if kind == "sd15":  # resumes: nothing is trained anew, but with other options

        def never(*_, **__):
            raise AssertionError("trained anew")

        monkeypatch.setattr(customconcept101, "train_concept", never)
        assert customconcept101.main([str(a) for a in arguments]) == rows
        with pytest.raises(AssertionError, match="trained anew"):
            customconcept101.main([str(a) for a in [*arguments, "--seed", 1]])


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_host_noises_as_its_scheduler_does_and_predicts_as_its_pipeline_does(folder, kind):
    model = open_folder(folder / kind)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(3, 4, 16, 16, generator=generator), torch.randn(3, 4, 16, 16, generator=generator)
    t = torch.tensor([10, 500, 990])
    assert torch.allclose(model.noised(x, noise, t), model.pipeline.scheduler.add_noise(x, noise, t), atol=1e-6)
    assert torch.equal(model.target(x, noise, t), noise)
    prompts = model.encode_prompts(["a fox", "a castle", ""])
    assert loss(model, x, noise, t, prompts).isfinite()
    # the pipeline draws by its own call of the UNet; without guidance its first step must be our prediction
    calls = []
    handle = model.unet.register_forward_hook(lambda m, args, out: calls.append((args, out)))
    model.sample(prompts[:1], seed=3, steps=2, guidance=1.0)
    handle.remove()
    (inputs, timestep), out = calls[0]
    with torch.no_grad():
        ours = model.predict(inputs, timestep.expand(1), prompts[:1])
    assert torch.allclose(ours, out[0], atol=1e-5)


def test_names_are_those_that_kohyas_files_have(folder):
    names = {s.name for s in open_folder(folder / "sd15").sites()}
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k" in names
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0" in names


def test_velocity_is_the_schedulers(folder):
    model = open_folder(folder / "sd15")
    model.kind = "v_prediction"
    x, noise, t = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.tensor([100, 900])
    assert torch.allclose(model.target(x, noise, t), model.pipeline.scheduler.get_velocity(x, noise, t), atol=1e-6)


def test_a_folder_that_is_no_pipeline_is_told(folder, tmp_path):
    with pytest.raises(UserError, match="no diffusers folder"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="no dataset.json"):
        customconcept101.load_entries(tmp_path, 32, None)


def test_conditioning_of_both_encoders_is_batched(folder):
    model = open_folder(folder / "sdxl")
    one, two = model.encode_prompts(["a fox"]), model.encode_prompts(["a castle"])
    both = Conditioning.cat([one, two])
    assert both.context.shape[0] == both.pooled.shape[0] == 2 and both.context.shape[2] == 64


def test_the_command_line_teaches_and_draws_on_a_diffusers_folder(folder, tmp_path, capsys):
    from seqlora_core.cli import main

    model, library = ["--model", str(folder / "sd15")], ["--library", str(tmp_path / "l")]
    assert main(["calibrate", *model, *library, "--pictures", "4"]) == 0
    images = str(folder / "data" / "benchmark_dataset" / "toy_fox")
    assert main(["train", *model, *library, "--images", images, "--trigger", "foxqi", "--steps", "2"]) == 0
    assert main(["sample", "a foxqi", *model, *library, "--output", str(tmp_path / "x.png")]) == 0
    assert main(["sample", "a foxqi", "--model", str(tmp_path), "--output", str(tmp_path / "y.png")]) == 2
    assert "no diffusers folder" in capsys.readouterr().err
