"""The sample workflows: up to date, whole, and running as they are in a real server."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workflows.build import LIBRARY, SUBJECTS, build
from workflows.pictures import shown

from .conftest import WORKFLOWS, api_graph, page_graph

ROOT = WORKFLOWS.parent
NAMES = sorted(p.stem for p in WORKFLOWS.glob("*.json"))


def test_committed_files_are_what_the_script_writes(tmp_path):
    build(tmp_path)
    written = {p.relative_to(tmp_path) for p in tmp_path.rglob("*.json")}
    assert written == {p.relative_to(ROOT) for part in ("workflows", "subgraphs") for p in (ROOT / part).rglob("*.json")}
    for path in sorted(written):
        assert (ROOT / path).read_text(encoding="utf-8") == (tmp_path / path).read_text(encoding="utf-8"), (
            f"{path} is stale: run make workflows"
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_has_a_small_picture(name):
    path = WORKFLOWS / f"{name}.jpg"
    with Image.open(path) as picture:
        assert picture.width >= 400 and path.stat().st_size < 150_000
        graph = (WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")
        assert picture.info.get("comment", b"").decode() == shown(graph), (
            f"{name}.jpg is stale: run python -m workflows.pictures"
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_says_what_to_swap(name):
    graph = page_graph(name)
    notes = [n["widgets_values"][0] for n in graph["nodes"] if n["type"] == "Note"]
    assert len(notes) == 1 and "Load Checkpoint" in notes[0] and len(notes[0]) < 500


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_to_drag_holds_the_workflow(name):
    with Image.open(ROOT / "docs" / "images" / "workflows" / f"{name}.png") as picture:
        prompt, page = json.loads(picture.info["prompt"]), json.loads(picture.info["workflow"])
    stale = f"{name}.png is stale: run python -m workflows.pictures"
    assert {k: (n["class_type"], n["inputs"]) for k, n in prompt.items()} == {
        k: (n["class_type"], n["inputs"]) for k, n in api_graph(name).items()
    }, stale
    notes = [n["widgets_values"] for n in page["nodes"] if n["type"] == "Note"]
    assert notes == [n["widgets_values"] for n in page_graph(name)["nodes"] if n["type"] == "Note"], stale


@pytest.mark.parametrize("name", NAMES)
def test_links_of_the_page_format_are_whole(name):
    graph = page_graph(name)
    nodes = {n["id"]: n for n in graph["nodes"]}
    for link, source, output, target, slot, kind in graph["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link and nodes[target]["inputs"][slot]["type"] == kind


def pictures_of(server, outputs):
    for image in (image for out in outputs.values() for image in out.get("images", [])):
        yield np.asarray(Image.open(io.BytesIO(server.picture(image))).convert("RGB"))


def test_the_projection_draws_what_the_lora_draws_alone(server):
    """Two ordinary LoRAs: nearer to what the stock loader makes of the one that is called, than their plain sum is."""
    graph = api_graph("bring_your_own_loras")
    outputs = server.run(graph)
    saved = {n["inputs"]["filename_prefix"].rpartition("_")[2]: k for k, n in graph.items() if n["class_type"] == "SaveImage"}
    summed, projected = (np.stack(list(pictures_of(server, {0: outputs[saved[k]]}))) for k in ("sum", "projected"))
    for node in graph.values():
        if node["class_type"] == "SeqLoRAApplyStack":
            inputs = {k: node["inputs"][k] for k in ("model", "clip")} | {"strength_model": 1.0, "strength_clip": 1.0}
            node |= {"class_type": "LoraLoader", "inputs": inputs | {"lora_name": "seqlora_demo_fox.safetensors"}}
    alone = np.stack(list(pictures_of(server, {0: server.run(graph)[saved["sum"]]})))
    far, near = (np.abs(p.astype(float) - alone).mean() for p in (summed, projected))
    assert near < 0.5 * far, (near, far)


def test_a_series_is_taught_in_order(server, taught):
    manifest = json.loads((server.base / "models" / "loras" / "seqlora" / LIBRARY / "library.json").read_text())
    assert [c["name"] for c in manifest["concepts"]] == list(SUBJECTS)


def test_a_workflow_draws(server, ran):
    pictures = list(pictures_of(server, ran[1]))
    assert pictures and all(p.std() > 5 for p in pictures), "a blank picture"
    if ran[0] == "export_one_lora":
        assert (server.base / "models" / "loras" / "seqlora_demo_stack.safetensors").stat().st_size > 10_000


def test_a_workflow_opens_on_the_page_and_the_run_button_draws_it(page, ran):
    page.open(page_graph(ran[0]))
    assert page.missing() == [] and page.alerts() == []
    assert page.prompt() == api_graph(ran[0])
    page.press_run()
    page.wait_until_done()
    shown = page.pictures()
    assert shown and all(width > 0 for width in shown.values())
    assert page.errors == []


def test_a_workflow_runs_through_comfy_cli(server, ran, tmp_path):
    """`comfy run` takes the page's format and the API's alike."""
    comfy = Path(sys.executable).with_name("comfy")
    if not comfy.exists():
        pytest.skip("no comfy-cli: pip install comfy-cli")
    file = f"{ran[0]}.json" if ran[0] == "stack_and_draw" else f"api/{ran[0]}.json"
    done = subprocess.run(
        [comfy, "--skip-prompt", "--where", "local", "run", "--workflow", WORKFLOWS / file, "--wait",
         "--host", "127.0.0.1", "--port", str(server.port)],
        capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path), "DO_NOT_TRACK": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_client_of_the_docs_runs_a_workflow(server, taught, tmp_path):
    script, graph = ROOT / "docs" / "client.py", WORKFLOWS / "api" / "teach_then_draw.json"
    subprocess.run([sys.executable, script, graph, f"http://127.0.0.1:{server.port}"], cwd=tmp_path, check=True, timeout=300)
    assert any(Image.open(p).size == (256, 256) for p in tmp_path.glob("*.png"))


def test_the_client_of_the_docs_says_what_went_wrong(server, tmp_path):
    missing = {
        "1": {"class_type": "SeqLoRALibrary", "inputs": {"library": "nobody has this", "concepts": "", "strength": 1.0}},
        "2": {"class_type": "SeqLoRAInterferenceReport", "inputs": {"stack": ["1", 0]}},
    }
    for graph, told in ((missing, "nobody has this"), ({"1": {"class_type": "No Such Node", "inputs": {}}}, "No Such Node")):
        (tmp_path / "graph.json").write_text(json.dumps(graph))
        done = subprocess.run(
            [sys.executable, ROOT / "docs" / "client.py", "graph.json", f"http://127.0.0.1:{server.port}"],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode != 0 and told in done.stderr and "Traceback" not in done.stderr


def test_the_template_browser_lists_them(server):
    listed = server.get("/workflow_templates")
    assert sorted(listed["seqlora"]) == NAMES
