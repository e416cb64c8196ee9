"""Training Options, masks, shapes and mirror images inside a real ComfyUI server."""

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from .comfy_server import Failed
from .test_stack_files import save
from .test_training import BASE, draw, images, pixels, train

USUAL = {
    "gradient_checkpointing": False, "accumulate": 1, "replay_batch": 4, "optimiser": "adam", "schedule": "half", "warmup": 0,
    "weight_decay": 0.0, "clip_gradient": 0.0, "timesteps": "model", "shift": 3.0, "min_snr": 0.0, "caption_dropout": 0.0,
    "shuffle_tags": False, "keep_latents": 8,
}  # fmt: skip


def train_with(options, name="octopus", pictures=None, library="options", **change):
    graph = train(library, name, steps=4, preview_every=0, batch_size=2, if_trained="train again", **change)
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
        "layers": "x_block", "trigger_rate": 0.2,
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
        ({"layers": "cross"}, "no layer of this model is named by layers 'cross'"),
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


def test_a_mask_of_another_shape_or_white_only_where_its_picture_is_cut_off_is_told(server):
    other = masked(1.0)
    other["10"]["inputs"]["height"] = 32
    with pytest.raises(Failed, match="the mask is 64 x 32 pixels, its picture 64 x 64: make them alike"):
        server.run(other)
    edge = masked(1.0)  # white at the left of a wide picture, of which the middle is kept
    edge["10"]["inputs"] |= {"width": 16}
    edge["12"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 128, "height": 64}}
    joined = {"destination": ["12", 0], "source": ["10", 0], "x": 0, "y": 0, "operation": "add"}
    edge["13"] = {"class_type": "MaskComposite", "inputs": joined}
    edge["11"]["inputs"]["width"], edge["2"]["inputs"]["mask"] = 128, ["13", 0]
    with pytest.raises(Failed, match="or white only in what is cut off"):
        server.run(edge)


def test_the_text_encoder_is_trained_and_read_by_the_stock_loader(server):
    """With strengths of 0 on one side each side shows what it alone does"""
    server.run(train_with({"text_encoder": True}, library="spoken", learning_rate=0.01))
    with safe_open(server.base / "models" / "loras" / "seqlora" / "spoken" / "octopus.safetensors", "np") as file:
        ups = [k for k in file.keys() if k.startswith("lora_te1_") and k.endswith("lora_up.weight")]
        assert len(ups) == 12 and all(np.abs(file.get_tensor(k)).max() > 0 for k in ups)
    name, before = "seqlora/spoken/octopus.safetensors", len(server.log_path.read_text())
    shown = {}
    for strength in (0.0, 1.0):
        stock = {"5": {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "clip": ["1", 1], "lora_name": name, "strength_model": 0.0, "strength_clip": strength}}}  # fmt: skip
        graph = draw({"1": {"class_type": "SeqLoRADemoModel", "inputs": {}}} | stock, ["5", 0], ["5", 1])
        shown[strength] = pixels(server, server.run(graph)).astype(float)
    log = server.log_path.read_text()[before:]
    assert "lora key not loaded" not in log and "NOT LOADED" not in log
    assert np.abs(shown[1.0] - shown[0.0]).mean() > 0.1
    with pytest.raises(Failed, match="was begun with the text encoder"):
        server.run(train_with({}, "penguin", library="spoken"))


def test_a_learnt_trigger_is_read_by_the_stock_loader_and_acts_on_it_alone(server):
    """At strength_model 0 only the trigger's embeddings act: on prompts that hold the trigger, on no others"""
    server.run(train_with({"learn_trigger": True}, library="called", learning_rate=0.01))
    with safe_open(server.base / "models" / "loras" / "seqlora" / "called" / "octopus.safetensors", "np") as file:
        table = next(k.removesuffix(".lora_up.weight") for k in file.keys() if k.endswith("token_embedding.lora_up.weight"))
        assert np.abs(file.get_tensor(f"{table}.lora_down.weight")).max() > 0
    name, before = "seqlora/called/octopus.safetensors", len(server.log_path.read_text())

    def drawn(prompt: str, loader: dict) -> np.ndarray:
        graph = draw({"1": {"class_type": "SeqLoRADemoModel", "inputs": {}}} | loader, ["5", 0], ["5", 1], prompt)
        return pixels(server, server.run(graph)).astype(float)

    def stock(strength: float) -> dict:
        return {"5": {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "clip": ["1", 1], "lora_name": name, "strength_model": 0.0, "strength_clip": strength}}}  # fmt: skip

    assert np.abs(drawn("an octzu animal", stock(1.0)) - drawn("an octzu animal", stock(0.0))).mean() > 0.1
    assert np.array_equal(drawn("a castle", stock(1.0)), drawn("a castle", stock(0.0)))
    log = server.log_path.read_text()[before:]
    assert "lora key not loaded" not in log and "NOT LOADED" not in log
    both = {"5": {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "clip": ["1", 1], "lora_name": name, "strength_model": 1.0, "strength_clip": 1.0}}}  # fmt: skip
    ours = {
        "4": {"class_type": "SeqLoRALibrary", "inputs": {"library": "called", "concepts": "", "strength": 1.0}},
        "5": {"class_type": "SeqLoRAApplyStack", "inputs": {"model": ["1", 0], "clip": ["1", 1], "stack": ["4", 0], "mode": "sum", "amount": 1.0}},
    }  # fmt: skip
    assert np.abs(drawn("an octzu animal", ours) - drawn("an octzu animal", both)).mean() < 1.0

    # and as an embedding it says the same without the LoRA's part for the text encoder
    library, given = BASE | {"4": ours["4"]}, {"clip": ["1", 1], "embeddings": True}
    with pytest.raises(Failed, match="connect the clip"):
        server.run(library | save("4", "called", embeddings=True))
    assert "in prompts: embedding:called_octopus" in server.run(library | save("4", "called", **given))["8"]["text"][0]
    (server.base / "models" / "loras" / "called.safetensors").unlink()
    with pytest.raises(Failed, match="called_octopus.safetensors exists in models/embeddings"):
        server.run(library | save("4", "called", rank=100, **given))
    alone = {"5": {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "clip": ["1", 1], "lora_name": name, "strength_model": 1.0, "strength_clip": 0.0}}}  # fmt: skip
    assert np.abs(drawn("an embedding:called_octopus animal", alone) - drawn("an octzu animal", both)).max() <= 1
    assert np.abs(drawn("an octzu animal", alone) - drawn("an octzu animal", both)).max() > 1


def test_the_samples_of_a_learnt_trigger_that_was_there_are_those_of_its_run(server):
    """What training switched on is off again when the concept is only used"""
    shown = []
    for if_trained in ("train again", "use it"):
        graph = train_with({"learn_trigger": True}, library="called", learning_rate=0.01) | {
            "12": {"class_type": "PreviewImage", "inputs": {"images": ["3", 3]}}
        }
        graph["3"]["inputs"]["if_trained"] = if_trained
        shown.append(pixels(server, server.run(graph), "12"))
    assert np.array_equal(*shown)


def test_both_levels_and_pictures_of_the_class(server):
    graph = train_with({"lower_steps": 1, "hypergradient": "neumann:1"}, library="levels")
    graph["10"] = images("demo/fox")
    graph["3"]["inputs"]["regularisation"] = ["10", 0]
    server.run(graph)
    with safe_open(server.base / "models" / "loras" / "seqlora" / "levels" / "octopus.safetensors", "np") as file:
        written = file.metadata()
    assert (written["seqlora.lower_steps"], written["seqlora.hypergradient"]) == ("1", "neumann:1")
