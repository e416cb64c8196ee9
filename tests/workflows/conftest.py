import json
from pathlib import Path

import pytest

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"


def api_graph(name: str) -> dict:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def page_graph(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def shorter(graph: dict, **change) -> dict:
    """The graph with fewer training steps, and other changes of Train Concept's inputs."""
    for node in graph.values():
        if node["class_type"] == "SeqLoRATrainConcept":
            node["inputs"] |= {"steps": 12, "preview_every": 0} | change
    return graph


@pytest.fixture(scope="session")
def taught(server):
    """The library that the workflows teach, taught in few steps: the committed graphs then run as they are."""
    return server.run(shorter(api_graph("teach_a_series")))


@pytest.fixture(scope="module", params=sorted(p.stem for p in WORKFLOWS.glob("*.json")))
def ran(request, server, taught):
    """(name, outputs) of each committed graph, run as it is.  Tests of one workflow follow it at once: ComfyUI keeps the
    last graph's results, so that running it again by other ways costs little."""
    return request.param, server.run(api_graph(request.param))


@pytest.fixture(scope="session")
def page(server):
    """ComfyUI's page in a real headless browser; skipped with the reason if there is none."""
    from .browser import Page, find_browser

    found = find_browser()
    if found.startswith("no "):
        pytest.skip(found)
    page = Page(found, server)
    yield page
    page.close()
