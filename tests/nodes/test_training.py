"""Training inside a real ComfyUI server: progress, cancel, files, errors."""

import io
import json
import re
import threading
import time

import numpy as np
import pytest
from PIL import Image

from .comfy_server import Failed

BASE = {"1": {"class_type": "SeqLoRADemoModel", "inputs": {}}}


def images(folder="demo/octopus", **change):
    return {"class_type": "SeqLoRAConceptImages", "inputs": {"folder": folder, "resolution": 64, "captions": ""} | change}


def train(library, name="octopus", trigger="octzu", **change):
    inputs = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0], "library": library, "name": name,
        "trigger": trigger, "class_noun": "animal", "rank": 4, "steps": 30, "learning_rate": 0.002,
        "interference_weight": 1.0, "seed": 0, "preview_every": 0,
    }  # fmt: skip
    return {**BASE, "2": images(), "3": {"class_type": "SeqLoRATrainConcept", "inputs": inputs | change}}


def draw(graph, model, clip, text="an octzu animal, blue background", node=20):
    """Adds nodes that draw one picture with this model; its SaveImage is node+5"""
    n = [str(node + i) for i in range(6)]
    return graph | {
        n[0]: {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": text}},
        n[1]: {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": ""}},
        n[2]: {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        n[3]: {"class_type": "KSampler", "inputs": {"model": model, "positive": [n[0], 0], "negative": [n[1], 0], "latent_image": [n[2], 0], "seed": 5, "steps": 10, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}},
        n[4]: {"class_type": "VAEDecode", "inputs": {"samples": [n[3], 0], "vae": ["1", 2]}},
        n[5]: {"class_type": "SaveImage", "inputs": {"images": [n[4], 0], "filename_prefix": "t"}},
    }  # fmt: skip


def pixels(server, outputs, node="25"):
    picture = server.picture(outputs[node]["images"][0])
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def free(server):
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)


@pytest.fixture(scope="module")
def trained(server):
    """A library `base` with one concept, trained for 30 steps."""
    outputs = server.run(train("base"))
    return outputs


def test_a_concept_that_is_there_shows_its_curves(server, trained):
    """Read back from its file: the picture of the run that trained it"""
    look = {
        "8": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
        "9": {"class_type": "PreviewImage", "inputs": {"images": ["3", 2]}},
    }
    shown = pixels(server, server.run(train("base") | look), "9")
    again = server.run(train("base", steps=31) | look)  # another input: the node runs again, and finds the concept
    assert "octopus is in the library already" in again["8"]["text"][0]
    assert shown.std() > 10 and np.array_equal(pixels(server, again, "9"), shown)


def test_thirty_steps_write_a_whole_concept(server, trained):
    folder = server.base / "models" / "loras" / "seqlora" / "base"
    assert json.loads((folder / "library.json").read_text())["concepts"][0]["name"] == "octopus"
    assert (folder / "octopus.safetensors").exists() and (folder / "octopus.stats.safetensors").exists()
    sheet = Image.open(io.BytesIO(server.picture(trained["3"]["images"][0])))
    assert sheet.width > 4 * 128 and sheet.height > 3 * 128  # four pictures a row, words beside and above them


def test_the_stock_loader_draws_the_same_as_apply_stack(server, trained):
    stack = {"4": {"class_type": "SeqLoRAConcept", "inputs": {"library": "base", "name": "octopus", "strength": 1.0}},
             "5": {"class_type": "SeqLoRAApplyStack", "inputs": {"model": ["1", 0], "clip": ["1", 1], "stack": ["4", 0], "mode": "sum", "amount": 1.0}}}  # fmt: skip
    ours = pixels(server, server.run(draw(BASE | stack, ["5", 0], ["5", 1])))
    stock = {"5": {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "clip": ["1", 1], "lora_name": "seqlora/base/octopus.safetensors", "strength_model": 1.0, "strength_clip": 1.0}}}  # fmt: skip
    theirs = pixels(server, server.run(draw(BASE | stock, ["5", 0], ["5", 1])))
    plain = pixels(server, server.run(draw(dict(BASE), ["1", 0], ["1", 1])))
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.abs(ours.astype(int) - plain).max() > 10
    log = server.log_path.read_text()
    assert "lora key not loaded" not in log and "NOT LOADED" not in log


def test_the_same_picture_before_training_and_after_everything_is_unloaded(server, trained):
    before = pixels(server, server.run(draw(dict(BASE), ["1", 0], ["1", 1])))
    server.run(train("unload", steps=3))
    free(server)
    after = pixels(server, server.run(draw(dict(BASE), ["1", 0], ["1", 1])))
    assert np.array_equal(before, after)


def test_comfyui_holds_no_model_that_nobody_uses(server, trained):
    """A model that outlives what was drawn with it makes ComfyUI collect garbage before every step from then on"""
    server.run(train("held", steps=2, preview_every=1))
    server.run(draw(dict(BASE), ["1", 0], ["1", 1], "a fox, red background"))
    assert "memory leak" not in server.log_path.read_text()


class Listener:
    """What arrives over the websocket: progress events and binary previews."""

    def __init__(self, server):
        import websocket

        self.socket = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId={server.client}", timeout=120)
        self.progress, self.binary, self.texts, self.open = 0, 0, [], True
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        while self.open:
            try:
                message = self.socket.recv()
            except Exception:
                return
            if isinstance(message, bytes):
                self.binary += 1
                if int.from_bytes(message[:4], "big") == 3:  # a line of text under the node
                    self.texts.append(message[4:].decode("utf-8", "replace"))
            elif message and json.loads(message)["type"] == "progress":
                self.progress += 1

    def await_first_step(self):
        """Until a step was told; before it a cancel finds nothing trained"""
        end = time.time() + 120
        while not any(re.search(r"step [1-9]\d* of", text) for text in self.texts):
            assert time.time() < end, self.texts
            time.sleep(0.05)

    def close(self):
        self.open = False
        self.socket.close()


def test_cancel_keeps_what_was_trained(server, trained):
    listener = Listener(server)
    prompt_id = server.submit(train("cancelled", steps=20000))
    folder = server.base / "models" / "loras" / "seqlora" / "cancelled"
    listener.await_first_step()
    listener.close()
    start = time.time()
    server.post("/interrupt")
    entry = server.wait(prompt_id, 60)
    assert time.time() - start < 20
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert (folder / "octopus.safetensors").exists()
    outputs = server.run(train("cancelled", steps=20000))  # "use it": nothing is trained again
    assert outputs["3"]["images"]
    assert len(list((folder / ".checkpoints" / "octopus").iterdir())) >= 1  # "train again" would go on from there
    with pytest.raises(Failed, match="unfinished run of 'octopus'.* began with steps 20000, not 5.*if_trained 'start anew'"):
        server.run(train("cancelled", steps=5, if_trained="train again"))
    before = (folder / "octopus.safetensors").read_bytes()
    with pytest.raises(Failed, match="lacks the trigger"):
        server.run(train("cancelled", "octopus", "nowhere", steps=5, if_trained="start anew"))
    assert (folder / "octopus.safetensors").read_bytes() == before and any((folder / ".checkpoints" / "octopus").iterdir())
    look = {"8": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}}}
    said = server.run(train("cancelled", steps=5, if_trained="start anew", planned_concepts=7) | look)["8"]["text"][0]
    assert "octopus: trained 5 steps" in said and "was planned for 32 when it was begun; 7 is ignored" in said
    assert (folder / "octopus.safetensors").read_bytes() != before and not (folder / ".checkpoints" / "octopus").exists()


def test_a_library_of_another_plan_is_no_matter_for_who_asks_for_none(server):
    look = {"8": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}}}
    server.run(train("few", steps=2, planned_concepts=5))
    said = server.run(train("few", "penguin", "pengvo", steps=2) | {"2": images("demo/penguin")} | look)["8"]["text"][0]
    assert "penguin: trained 2 steps" in said and "ignored" not in said


def test_a_second_concept_stands_beside_the_first(server, trained):
    graph = train("base", "penguin", "pengvo", steps=5)
    graph["2"] = images("demo/penguin")
    graph["4"] = {"class_type": "SeqLoRALibrary", "inputs": {"library": "base", "concepts": "", "strength": 1.0}}
    graph["6"] = {"class_type": "SeqLoRAInterferenceReport", "inputs": {"stack": ["3", 0]}}
    graph["7"] = {
        "class_type": "SeqLoRASaveStack",
        "inputs": {"stack": ["3", 0], "name": "both", "mode": "sum", "amount": 1.0, "overwrite": True},
    }
    outputs = server.run(graph)
    assert outputs["6"]["images"]
    assert (server.base / "models" / "loras" / "both.safetensors").exists()
    manifest = json.loads((server.base / "models" / "loras" / "seqlora" / "base" / "library.json").read_text())
    assert [c["name"] for c in manifest["concepts"]] == ["octopus", "penguin"]


def test_progress_arrives_with_a_preview(server, trained):
    """Over the websocket: progress events, our text, and preview pictures."""
    listener = Listener(server)
    server.run(train("progress", steps=15, preview_every=5))
    time.sleep(0.5)
    listener.close()
    assert listener.progress >= 1 and listener.binary > len(listener.texts) > 0
    assert any(re.search(r"step 10 of 15, \d+:\d\d left, loss \d", text) for text in listener.texts), listener.texts


BAD = [
    (dict(name=""), "concept name is empty"),
    (dict(name="a/b"), "cannot be a file name"),
    (dict(library="../x"), "cannot be a file name"),
    (dict(library=""), "library name is empty"),
    (dict(trigger=""), "trigger is empty"),
    (dict(trigger="nowhere"), "lacks the trigger 'nowhere'"),
    (dict(rank=0), "smaller than min"),
    (dict(steps=0), "smaller than min"),
    (dict(learning_rate=1.5), "bigger than max"),
    (dict(interference_weight=-1.0), "smaller than min"),
    (dict(batch_size=0), "smaller than min"),
    (dict(preview_every=-1), "smaller than min"),
    (dict(planned_concepts=0), "smaller than min"),
    (dict(seed=-1), "smaller than min"),
    (dict(if_trained="maybe"), "not in list|if_trained is 'maybe'"),
]


@pytest.mark.parametrize("change, message", BAD, ids=lambda v: str(v)[:30])
def test_bad_input_of_the_trainer_gets_one_clear_sentence(server, change, message):
    with pytest.raises(Failed, match=message):
        server.run(train(**({"library": "bad"} | change)))


def test_links_of_the_wrong_kind_are_refused(server):
    for name in ("model", "clip", "vae", "images", "after"):
        with pytest.raises(Failed, match="return_type_mismatch|mismatch"):
            server.run(train("bad", **{name: ["1", 2] if name != "vae" else ["1", 0]}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"folder": "absent"}, "no folder .*absent"),
        ({"folder": "../../etc"}, "cannot be a file name"),
        ({"folder": "/etc"}, "no folder"),
        ({"folder": ""}, "no folder given"),
        ({"folder": "demo/unknown"}, "no folder"),
        ({"captions": "one octzu\ntwo octzu"}, "2 captions for 10 pictures"),
        ({"resolution": 1}, "smaller than min"),
        ({"resolution": 512}, "512 x 512 pixels do not fit this model: choose sides of at most 256"),
    ],
)
def test_bad_pictures_get_one_clear_sentence(server, change, message):
    graph = train("bad")
    graph["2"] = images(**change)
    with pytest.raises(Failed, match=message):
        server.run(graph)


@pytest.mark.parametrize(
    "kind, inputs, message",
    [
        ("SeqLoRAConcept", {"library": "absent", "name": "x", "strength": 1.0}, "no library"),
        ("SeqLoRAConcept", {"library": "base", "name": "x", "strength": 1.0}, "no concept 'x'.*octopus"),
        ("SeqLoRAConcept", {"library": "base", "name": "octopus", "strength": 9.0}, "bigger than max"),
        ("SeqLoRALibrary", {"library": "base", "concepts": "octopus: much", "strength": 1.0}, "no number after the colon"),
        ("SeqLoRALibrary", {"library": "base", "concepts": "cat", "strength": 1.0}, "no concept 'cat'"),
        ("SeqLoRALibrary", {"library": "C:\\\\x", "concepts": "", "strength": 1.0}, "cannot be a file name"),
    ],
)
def test_bad_names_of_loaders_get_one_clear_sentence(server, trained, kind, inputs, message):
    graph = {
        "4": {"class_type": kind, "inputs": inputs},
        "6": {"class_type": "SeqLoRAInterferenceReport", "inputs": {"stack": ["4", 0]}},
    }
    with pytest.raises(Failed, match=message):
        server.run(graph)


@pytest.mark.parametrize(
    "change, message",
    [({"mode": "magic"}, "not in list|unknown mode"), ({"amount": 2.0}, "bigger than max"), ({"name": "../x"}, "cannot be a file name"), ({"overwrite": False}, "exists in models/loras"), ({"embeddings": True}, "nothing of the stack has a trigger that was learnt")],
)  # fmt: skip
def test_bad_input_of_save_stack(server, trained, change, message):
    inputs = {"stack": ["4", 0], "name": "once", "mode": "sum", "amount": 1.0, "overwrite": True}
    graph = {
        "4": {"class_type": "SeqLoRAConcept", "inputs": {"library": "base", "name": "octopus", "strength": 1.0}},
        "7": {"class_type": "SeqLoRASaveStack", "inputs": inputs},
    }
    server.run(graph)
    graph["7"] = {"class_type": "SeqLoRASaveStack", "inputs": inputs | change}
    with pytest.raises(Failed, match=message):
        server.run(graph)


def test_a_library_of_another_model_is_refused(server, trained):
    folder = server.base / "models" / "loras" / "seqlora" / "foreign"
    folder.mkdir(parents=True)
    manifest = {"format": 1, "base": "0123456789abcdef", "planned": 32, "concepts": []}
    (folder / "library.json").write_text(json.dumps(manifest))
    with pytest.raises(Failed, match="another base model"):
        server.run(train("foreign"))
