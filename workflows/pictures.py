"""Runs every workflow as it is in a real ComfyUI and browser, and takes the pictures that pages and docs show.

    python -m workflows.pictures [NAME ...]

workflows/NAME.jpg            the graph after its run: what the template browser shows
docs/images/workflows/*.png   a picture that it drew, with the graph inside: drag it onto ComfyUI
web/docs/images/*.png         every node, for its help page (NAME: nodes)
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.nodes.comfy_server import Server, find_comfyui
from tests.workflows.browser import EMPTY, Page, find_browser

from .build import HERE, LIBRARY, SUBJECTS, WORKFLOWS

DRAWN = HERE.parent / "docs" / "images" / "workflows"
NODES = HERE.parent / "web" / "docs" / "images"


def take(page: Page, name: str) -> None:
    """Of a run with nothing of other workflows in its library; those that are about teaching begin with an empty one"""
    graph = (HERE / f"{name}.json").read_text(encoding="utf-8")
    library = page.server.base / "models" / "loras" / "seqlora" / LIBRARY
    here = {path.stem for path in library.glob("*.safetensors")} & set(SUBJECTS)
    if name.startswith("teach") or any(f'"{subject}"' not in graph for subject in here):
        shutil.rmtree(library, ignore_errors=True)
    page.open(json.loads(graph))
    page.press_run()
    page.wait_until_done(1200)
    page.fit()
    shot = DRAWN / "shot.png"
    page.screenshot_canvas(shot)
    small = Image.open(shot).convert("RGB").resize((1024, 615), Image.Resampling.LANCZOS)
    small.save(HERE / f"{name}.jpg", quality=82, comment=shown(graph))
    shot.unlink()
    newest = max(page.server.get("/history").values(), key=lambda entry: entry["prompt"][0])
    images = [image for out in newest["outputs"].values() for image in out.get("images", [])]
    drawn = next((i for i in images if i["type"] == "output"), images[0])
    save_to_drag(page.server.picture(drawn), name)


def shown(graph: str) -> str:
    """What a picture says of the graph that it was taken of"""
    return hashlib.sha256(graph.encode()).hexdigest()


def save_to_drag(picture: bytes, name: str) -> None:
    """A PNG that opens this workflow when it is dragged onto ComfyUI; what a cached node drew holds an earlier one's graph"""
    about = PngInfo()
    about.add_text("prompt", (HERE / "api" / f"{name}.json").read_text(encoding="utf-8"))
    about.add_text("workflow", (HERE / f"{name}.json").read_text(encoding="utf-8"))
    Image.open(BytesIO(picture)).save(DRAWN / f"{name}.png", pnginfo=about)


def take_nodes(page: Page) -> None:
    for kind in sorted(name for name in page.server.info if name.startswith("SeqLoRA")):
        page.open(EMPTY)
        page.add_node(kind)
        page.fit(margin=40)
        page.screenshot_node(NODES / f"{kind}.png")


def main() -> None:
    names = sys.argv[1:] or ["nodes", *(make().title for make in WORKFLOWS)]
    for folder in (DRAWN, NODES):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = Server(*find_comfyui(), Path(folder))
        page = Page(find_browser(), server)
        try:
            for name in names:
                take_nodes(page) if name == "nodes" else take(page, name)
        finally:
            page.close()
            server.stop()


if __name__ == "__main__":
    main()
