"""What a person sees: pages, help, progress in a real headless browser."""

import json

import pytest

from workflows.build import LIBRARY

from .browser import EMPTY
from .conftest import WORKFLOWS, api_graph, page_graph

ROOT = WORKFLOWS.parent


def test_a_picture_dropped_onto_the_page_opens_its_workflow(page, server, taught, tmp_path):
    graph = {
        "prompt": api_graph("teach_then_draw"),
        "extra_data": {"extra_pnginfo": {"workflow": page_graph("teach_then_draw")}},
    }
    outputs = server.wait(server.post("/prompt", graph | {"client_id": server.client})["prompt_id"])["outputs"]
    saved = next(out["images"][0] for out in outputs.values() if out.get("images", [{}])[0].get("type") == "output")
    file = tmp_path / saved["filename"]
    file.write_bytes(server.picture(saved))
    page.open(page_graph("teach_a_concept"))
    page.drop(file)
    assert page.prompt() == api_graph("teach_then_draw") and page.missing() == [] and page.errors == []


def test_training_tells_how_far_it_is(page):
    page.open(page_graph("teach_a_concept"))
    page.set_widgets(steps=90, library="browser", preview_every=0)
    page.hear_progress()
    page.press_run()
    shown = set()
    page.wait_until_done(each=lambda: shown.add(page.progress_text()))
    told = set(page.progress_told())
    assert len([text for text in told if "of 90" in text]) >= 9 and shown & told, (told, shown)
    assert page.pictures()["PreviewImage"] > 0 and page.errors == []


def test_the_help_panel_shows_our_pages(page, server):
    for kind in (name for name in server.info if name.startswith("SeqLoRA")):
        page.open(EMPTY)
        page.add_node(kind)
        page.help_of(kind)
        assert page.help_title() == server.info[kind]["display_name"].removesuffix(" (SeqLoRA)")
        assert page.help_pictures() and all(page.help_pictures()), kind
    page.close_side_panel()
    assert page.errors == []


@pytest.mark.parametrize("name", ["SeqLoRA teach", "SeqLoRA stack"])
def test_a_blueprint_runs_as_one_node(page, taught, name):
    page.open(json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8")))
    assert page.missing() == []
    page.set_widgets(library=LIBRARY)
    page.join_to_demo_model()
    page.press_run()
    page.wait_until_done()
    assert page.last_run()["status_str"] == "success" and page.errors == []
