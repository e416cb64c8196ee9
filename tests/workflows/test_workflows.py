"""The sample workflows: up to date, whole, and running as they are in a real server."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = ["teach_a_concept", "stack_and_draw", "teach_then_draw"]


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("workflow_builder", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_files_are_what_the_script_writes(builder, tmp_path):
    builder.build(tmp_path)
    for path in sorted(tmp_path.rglob("*.json")):
        committed = FOLDER / path.relative_to(tmp_path)
        assert committed.read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), (
            f"{committed.name} is stale: run make workflows"
        )
    assert {p.stem for p in FOLDER.glob("*.json")} == {p.stem for p in (FOLDER / "api").glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_has_a_picture(name):
    assert Image.open(FOLDER / f"{name}.jpg").width >= 400


@pytest.mark.parametrize("name", NAMES)
def test_links_of_the_page_format_are_whole(name):
    graph = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    nodes = {n["id"]: n for n in graph["nodes"]}
    for link, source, output, target, slot, kind in graph["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link and nodes[target]["inputs"][slot]["type"] == kind


def shortened(name):
    """The committed API graph with fewer steps and a library of its own"""
    graph = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        if node["class_type"] == "SeqLoRATrainConcept":
            node["inputs"] |= {"steps": 25, "library": f"workflow_{name}", "preview_every": 10}
    return graph


@pytest.mark.parametrize("name", NAMES)
def test_workflows_run_through_the_api(server, name):
    outputs = server.run(shortened(name))
    pictures = [image for out in outputs.values() for image in out.get("images", [])]
    assert pictures
    for image in pictures:
        picture = np.asarray(Image.open(io.BytesIO(server.picture(image))).convert("RGB"))
        assert picture.std() > 5, "a blank picture"
    library = server.base / "models" / "loras" / "seqlora" / f"workflow_{name}" / "library.json"
    taught = [c["name"] for c in json.loads(library.read_text())["concepts"]]
    assert taught == (["octopus", "penguin"] if name == "stack_and_draw" else ["octopus"])


def test_the_template_browser_lists_them(server):
    listed = server.get("/workflow_templates")
    assert sorted(listed["seqlora"]) == sorted(NAMES)
