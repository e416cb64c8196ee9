"""Training Options, masks, shapes and mirror images inside a real ComfyUI server."""

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from .comfy_server import Failed
from .test_training import images, train

USUAL = {
    "gradient_checkpointing": False, "accumulate": 1, "replay_batch": 4, "optimiser": "adam", "schedule": "half", "warmup": 0,
    "weight_decay": 0.0, "clip_gradient": 0.0, "timesteps": "model", "shift": 3.0, "min_snr": 0.0, "caption_dropout": 0.0,
    "shuffle_tags": False, "keep_latents": 8,
}  # fmt: skip


def train_with(options, name="octopus", pictures=None, **change):
    graph = train("options", name, steps=4, preview_every=0, batch_size=2, if_trained="train again", **change)
    if pictures is not None:
        graph["2"] = pictures
    graph["3"]["inputs"]["options"] = ["8", 0]
    graph["8"] = {"class_type": "SeqLoRATrainingOptions", "inputs": USUAL | options}
    graph["9"] = {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}}
    return graph


def test_options_reach_the_training(server):
    other = {
        "gradient_checkpointing": True, "accumulate": 2, "optimiser": "adamw", "schedule": "cosine", "warmup": 1, "weight_decay": 0.1,
        "clip_gradient": 1.0, "timesteps": "shifted", "shift": 2.0, "caption_dropout": 0.2, "shuffle_tags": True, "keep_latents": 3,
    }  # fmt: skip
    server.run(train_with(other))
    folder = server.base / "models" / "loras" / "seqlora" / "options"
    with safe_open(folder / "octopus.safetensors", "np") as file:
        written = file.metadata()
    for name, value in other.items():
        assert written["seqlora." + {"clip_gradient": "clip"}.get(name, name)] == str(value)
    with safe_open(folder / "octopus.stats.safetensors", "np") as file:
        assert len(file.get_tensor("latents")) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_snr": 5.0}, "min_snr is for models that predict noise or velocity"),
        ({"warmup": 4}, "warmup is 4 of 4 steps: give less"),
        ({"optimiser": "prodigy"}, "prodigy finds the rate itself"),
        ({"optimiser": "magic"}, "not in list|optimiser is 'magic'"),
        ({"accumulate": 0}, "smaller than min"),
        ({"caption_dropout": 1.0}, "bigger than max"),
    ],
)
def test_bad_options_get_one_clear_sentence(server, options, message):
    with pytest.raises(Failed, match=message):
        server.run(train_with(options, "bad"))


@pytest.fixture(scope="module")
def folder(server):
    """Two pictures of different shapes in ComfyUI's input folder, one with a mask beside it"""
    made = server.base / "input" / "shapes"
    made.mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in {"tall": (48, 96), "wide": (128, 64), "wide2": (128, 64)}.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(made / f"{name}.png")
    mask = np.zeros((96, 48), np.uint8)
    mask[:48] = 255
    Image.fromarray(mask).save(made / "tall.mask.png")
    return made


def test_each_picture_keeps_its_shape_and_the_report_says_what_it_became(server, folder):
    outputs = server.run(train_with({}, "shapes", images("shapes", buckets=True, flip=True)))
    text = outputs["9"]["text"][0]
    assert "tall.png: 48 x 96 became 32 x 80" in text and "wide.png: 128 x 64 became 80 x 32" in text
    squares = server.run(train_with({}, "squares", images("shapes")))["9"]["text"][0]
    assert "tall.png: 48 x 96 became 64 x 64" in squares and "enlarged" in squares


def test_a_caption_for_each_picture_needs_an_order(server, folder):
    graph = train_with({}, "shapes", images("shapes", buckets=True, captions="octzu a\noctzu b\noctzu c"))
    with pytest.raises(Failed, match="pictures of several shapes have no order"):
        server.run(graph)


def masked(value, **change):
    """Connected images with a mask of one value"""
    graph = train_with({}, "masked", images("", **change))
    graph["10"] = {"class_type": "SolidMask", "inputs": {"value": value, "width": 64, "height": 64}}
    graph["11"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": 255}}
    graph["2"]["inputs"] |= {"images": ["11", 0], "mask": ["10", 0]}
    return graph


def test_masks_of_connected_images(server, folder):
    assert server.run(masked(1.0, flip=True))["3"]["images"]
    with pytest.raises(Failed, match="a mask is all black"):
        server.run(masked(0.0))
    Image.new("L", (48, 96)).save(folder / "tall.mask.png")
    with pytest.raises(Failed, match="the mask of .*tall.png is all black"):
        server.run(train_with({}, "black", images("shapes")))
    assert server.run(train_with({}, "black", images("shapes", masks="none")))["3"]["images"]
