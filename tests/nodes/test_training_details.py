"""What the trainer says of its pictures and files, and how it is stopped and gone on with, inside a real ComfyUI server."""

import hashlib
import time

import pytest
from PIL import Image
from safetensors import safe_open

from seqlora_core.demo_model import DEMO_MODEL
from seqlora_core.library import Library

from .comfy_server import Failed
from .test_training import Listener, images, train
from .test_training_options import USUAL

REPORT = {"8": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}}}


@pytest.fixture(scope="module")
def pictures(server):
    """Folders of ComfyUI's input folder, each with something wrong"""
    folder = server.base / "input"
    for name in ("empty", "nothing_in_it", "dot", "caption", "html"):
        (folder / name).mkdir(parents=True)
    (folder / "nothing_in_it" / "a.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(folder / "dot" / "a.png")
    (folder / "html" / "a.jpg").write_text("<html>not found</html>")
    Image.new("RGB", (64, 64), "red").save(folder / "caption" / "a.png")
    (folder / "caption" / "a.txt").write_bytes(b"an octzu \xff\xfe animal")
    return folder


@pytest.mark.parametrize(
    "folder, message",
    [
        ("empty", "no images in .*empty: put PNG, JPEG or WebP files there"),
        ("nothing_in_it", "cannot read the image .*a.png: it is damaged or empty"),
        ("html", "cannot read the image .*a.jpg: it is damaged or empty"),
        ("dot", "a.png is 1 x 1 pixels: too small"),
        ("caption", "a.txt is not UTF-8 text: save it again as UTF-8"),
    ],
)
def test_what_is_wrong_with_a_picture_is_told(server, pictures, folder, message):
    with pytest.raises(Failed, match=message):
        server.run(train("wrong") | {"2": images(folder)})


@pytest.mark.parametrize("name", ["photos (2024)", "Bob's cat/2", "..", "photos (2024)/../..", "a:b"])
def test_a_folder_that_is_there_is_read_whatever_it_is_called_and_none_outside(server, pictures, name):
    there = ".." not in name and ":" not in name
    if there:
        (pictures / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(pictures / name / "a.png")
    with pytest.raises(Failed, match="lacks the trigger" if there else "cannot be a file name everywhere"):
        server.run(train("wrong") | {"2": images(name, captions="read")})


def test_captions_may_be_templates(server):
    graph = train("templates", steps=1) | {"2": images(captions="a {trigger} {class}, red background")}
    server.run(graph)
    with safe_open(server.base / "models" / "loras" / "seqlora" / "templates" / "octopus.safetensors", "pt") as file:
        assert '"red background": 10' in file.metadata()["ss_tag_frequency"]


def test_the_report_says_what_connected_images_became_and_which_are_there_twice(server):
    grey = {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 32, "batch_size": 2, "color": 0x808080}}
    graph = train("connected", steps=1) | {"2": images(images=["7", 0]), "7": grey} | REPORT
    said = server.run(graph)["8"]["text"][0]
    assert "2 connected images: 16 x 32 became 64 x 64" in said and "enlarged 4.0 times" in said
    assert "connected image 2 is the same picture as 1" in said


def test_a_connected_dot_is_too_small(server):
    dots = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 4, "batch_size": 2, "color": 0}}
    with pytest.raises(Failed, match="connected image 1 is 64 x 4 pixels: too small to learn from"):
        server.run(train("wrong") | {"2": images(images=["7", 0]), "7": dots})


def test_the_same_graph_trains_once_until_its_concept_is_taken_out(server):
    graph = train("once", steps=1, if_trained="start anew")
    made = []
    for _ in range(4):
        server.run(graph)
        library = Library(server.base / "models" / "loras" / "seqlora" / "once")
        made.append(library.paths("octopus")[0].stat().st_mtime_ns)
        if len(made) == 2:
            library.remove("octopus")
    assert made[0] == made[1] < made[2] == made[3]


def test_the_file_names_its_base_model_by_its_hash(server):
    server.run(train("hashed", steps=1))
    with safe_open(server.base / "models" / "loras" / "seqlora" / "hashed" / "octopus.safetensors", "pt") as file:
        said = file.metadata()
    assert said["ss_new_sd_model_hash"] == hashlib.sha256(DEMO_MODEL.read_bytes()).hexdigest()
    assert said["ss_sd_model_name"] == DEMO_MODEL.name


def test_a_rank_that_has_no_room_is_told(server):
    said = server.run(train("ranks", steps=1, rank=128, planned_concepts=101) | REPORT)["8"]["text"][0]
    assert "planned for 101 concepts, each gets rank 1 in layers of 192 inputs, of 128 asked for" in said


def test_a_trigger_of_another_concept_is_told(server):
    server.run(train("triggers", steps=1))
    said = server.run(train("triggers", name="second", steps=1) | REPORT)["8"]["text"][0]
    assert "'octzu' calls 'octopus' of this library too" in said


def test_a_cancel_ends_a_calibration(server):
    """Pictures of another size: the library's calibration is made anew, which takes much longer than the cancel may"""
    prompt = server.submit(train("slow", steps=2) | {"2": images(resolution=128)})
    time.sleep(4)
    start = time.time()
    server.post("/interrupt")
    entry = server.wait(prompt, 60)
    assert time.time() - start < 10
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"])
    assert not (server.base / "models" / "loras" / "seqlora" / "slow" / "octopus.safetensors").exists()


def test_a_cancelled_run_goes_on_to_the_very_same_file(server):
    files = {}
    for library in ("never", "stopped"):
        if library == "stopped":
            listener = Listener(server)
            prompt = server.submit(train(library, steps=10, preview_every=0))
            listener.await_first_step()
            listener.close()
            server.post("/interrupt")
            server.wait(prompt, 60)
            assert list((server.base / "models" / "loras" / "seqlora" / library / ".checkpoints" / "octopus").iterdir())
        server.run(train(library, steps=10, preview_every=0, if_trained="train again"))
        files[library] = (server.base / "models" / "loras" / "seqlora" / library / "octopus.safetensors").read_bytes()
    assert files["never"] == files["stopped"]


def test_as_many_checkpoints_are_kept_as_training_options_says(server):
    graph = train("checkpoints", steps=20000, preview_every=0)
    graph["3"]["inputs"]["options"] = ["8", 0]
    options = USUAL | {"checkpoint_every": 2, "checkpoint_keep": 3, "replay_every": 4}
    graph["8"] = {"class_type": "SeqLoRATrainingOptions", "inputs": options}
    prompt = server.submit(graph)
    folder = server.base / "models" / "loras" / "seqlora" / "checkpoints"
    end = time.time() + 120
    while len(found := list((folder / ".checkpoints" / "octopus").glob("step-*.checkpoint"))) < 3 and time.time() < end:
        time.sleep(0.1)
    first = {p.name for p in found}
    while first & {p.name for p in (folder / ".checkpoints" / "octopus").glob("step-*.checkpoint")} and time.time() < end:
        time.sleep(0.1)
    server.post("/interrupt")
    server.wait(prompt, 60)
    assert len(list((folder / ".checkpoints" / "octopus").glob("step-*.checkpoint"))) == 3
    with safe_open(folder / "octopus.safetensors", "np") as file:
        assert file.metadata()["seqlora.replay_every"] == "4"


def test_a_list_of_images_of_any_sizes_is_one_concept(server):
    """As folder loaders give them out, each with a mask of its own"""
    graph = train("listed", "many", "manyzu", steps=1) | REPORT
    graph["9"] = {"class_type": "TheirFolder", "inputs": {"text": "48x64 64x64 80x64"}}
    graph["2"] = images(captions="one manyzu\ntwo manyzu\nthree manyzu", images=["9", 0], mask=["9", 1])
    said = server.run(graph)["8"]["text"]
    assert len(said) == 1 and "in the library already" not in said[0]
    assert "1 connected image: 48 x 64 became 64 x 64" in said[0] and "1 connected image: 80 x 64 became 64 x 64" in said[0]
    assert "connected image 3 is captioned 'three manyzu'" in said[0]
    with safe_open(server.base / "models" / "loras" / "seqlora" / "listed" / "many.safetensors", "pt") as file:
        assert file.metadata()["ss_num_train_images"] == "3"
