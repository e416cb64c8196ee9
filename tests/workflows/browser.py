"""ComfyUI's page in headless Chromium, driven by Playwright: what a person does with a workflow."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

QUIET = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
EMPTY = {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "version": 0.4}
# what ComfyUI itself asks for and does not have; help in the page's language, before the page that serves all
NOT_OURS = ("favicon.ico", "/user.css", "userdata", "/en.md")


def find_browser() -> str:
    """Path of a Chromium, or the reason why there is none ("no ...")."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "no playwright: pip install playwright"
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
    return next(
        filter(None, (os.environ.get("CHROMIUM"), *map(shutil.which, names))), "no Chromium: install it, or set CHROMIUM"
    )


class Page:
    def __init__(self, browser: str, server):
        from playwright.sync_api import sync_playwright

        self.server, self.errors = server, []
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(executable_path=browser, args=QUIET)
        self.tab = self._browser.new_page(viewport={"width": 1600, "height": 1000})
        self.tab.set_default_timeout(240_000)  # a busy machine
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("console", self._console)
        self.tab.goto(f"http://127.0.0.1:{server.port}", wait_until="domcontentloaded", timeout=240_000)
        self.tab.wait_for_function("window.app?.extensionManager && window.app.graph")
        self.tab.wait_for_function("Object.keys(window.LiteGraph.registered_node_types).some(n => n.startsWith('SeqLoRA'))")

    def _console(self, message) -> None:
        if message.type == "error" and not any(part in message.location.get("url", "") for part in NOT_OURS):
            self.errors.append(message.text)

    def open(self, graph: dict) -> None:
        """Load a workflow of the page format; errors are counted from here."""
        self.errors.clear()
        self.tab.evaluate("async graph => { await window.app.loadGraphData(graph) }", graph)

    def drop(self, file: Path) -> None:
        """Drag a file onto the canvas."""
        self.errors.clear()
        before = self.tab.evaluate("window.app.graph.id")
        self.tab.evaluate(
            """async ([bytes, name, type]) => {
                const data = new DataTransfer()
                data.items.add(new File([new Uint8Array(bytes)], name, { type }))
                const at = { clientX: 800, clientY: 500, bubbles: true, cancelable: true, dataTransfer: data }
                for (const kind of ['dragover', 'drop'])
                    document.querySelector('#graph-canvas').dispatchEvent(new DragEvent(kind, at))
            }""",
            [list(file.read_bytes()), file.name, "image/png" if file.suffix == ".png" else "application/json"],
        )
        self.tab.wait_for_function("before => window.app.graph.id !== before", arg=before)

    def prompt(self) -> dict:
        """What the page would queue."""
        return self.tab.evaluate("async () => (await window.app.graphToPrompt()).output")

    def alerts(self) -> list[str]:
        """Texts of the page's own warnings and errors."""
        return self.tab.locator(".p-toast-message").all_inner_texts()

    def missing(self) -> list[str]:
        """Node types that the page does not know."""
        return self.tab.evaluate(
            """() => window.app.graph.nodes.filter(n => n.has_errors || !n.constructor.nodeData && n.type !== 'Note' && !n.isSubgraphNode?.())
                .map(n => n.type)"""
        )

    def add_node(self, kind: str) -> None:
        self.tab.evaluate(
            """kind => { const node = window.LiteGraph.createNode(kind); window.app.graph.add(node)
                node.setSize([Math.max(300, node.size[0]), node.size[1]]) }""",
            kind,
        )

    def join_to_demo_model(self) -> None:
        """Adds a Demo Model to a graph of one node, and a look at its second output."""
        self.tab.evaluate(
            """() => {
                const { graph } = window.app, [node] = graph.nodes
                const add = kind => { const n = window.LiteGraph.createNode(kind); graph.add(n); return n }
                const model = add('SeqLoRADemoModel'), look = add('PreviewAny')
                for (const [slot, output] of model.outputs.entries()) {
                    const input = node.findInputSlot(output.name)
                    if (input >= 0) model.connect(slot, node, input)
                }
                node.connect(node.outputs.findIndex(o => o.type === 'STRING'), look, 0) }"""
        )

    def last_run(self) -> dict:
        """Status of the newest entry of the history."""
        return max(self.server.get("/history").values(), key=lambda entry: entry["prompt"][0])["status"]

    def set_widgets(self, **values) -> None:
        """On every node that has a widget of the name."""
        self.tab.evaluate(
            """values => window.app.graph.nodes.flatMap(n => n.widgets ?? [])
                .filter(w => w.name in values).forEach(w => { w.value = values[w.name] })""",
            values,
        )

    def press_run(self) -> None:
        self.tab.get_by_role("button", name="Run", exact=True).first.click()

    def wait_until_done(self, seconds: float = 120, each=lambda: None) -> None:
        """Until the queue is empty and the page has taken in the last event; calls `each` all the while."""
        end = time.time() + seconds
        self.tab.wait_for_timeout(300)
        while time.time() < end:
            each()
            queue = self.server.get("/queue")
            if not queue["queue_running"] and not queue["queue_pending"]:
                self.tab.wait_for_timeout(500)
                return
            self.tab.wait_for_timeout(100)
        raise TimeoutError(f"the queue still runs after {seconds} s")

    def pictures(self) -> dict[str, int]:
        """Type of each node that shows pictures on the canvas -> width of its first, as loaded by the page: waits for one."""
        self.tab.wait_for_function("() => window.app.graph.nodes.some(n => n.imgs?.[0]?.naturalWidth)", timeout=60_000)
        return self.tab.evaluate(
            "() => Object.fromEntries(window.app.graph.nodes.filter(n => n.imgs?.length).map(n => [n.type, n.imgs[0].naturalWidth]))"
        )

    def progress_text(self) -> str:
        return self.tab.evaluate(
            """() => window.app.graph.nodes.flatMap(n => n.widgets ?? []).filter(w => w.name === '$$node-text-preview')
                .map(w => String(w.value)).join(' ')"""
        )

    def hear_progress(self) -> None:
        """Collects from here on what the page is told, which a busy page may show only in part"""
        self.tab.evaluate(
            """() => { window.told = []; window.app.api.addEventListener('progress_text', e => window.told.push(e.detail.text)) }"""
        )

    def progress_told(self) -> list[str]:
        return self.tab.evaluate("() => window.told")

    def help_of(self, kind: str) -> str:
        """Opens the help panel of the first node of this type, as its i button does; the text that it shows."""
        self.close_side_panel()  # an open one would lie over the button
        self.fit(margin=250)
        self.tab.evaluate(
            """kind => { const node = window.app.graph.nodes.find(n => n.type === kind)
                window.app.canvas.selectNode(node); window.app.canvas.setDirty(true, true) }""",
            kind,
        )
        self.tab.get_by_test_id("info-button").click()
        self.tab.wait_for_selector(".node-help-content h1")
        self.tab.wait_for_function("[...document.querySelectorAll('.node-help-content img')].every(i => i.complete)")
        return self.tab.inner_text(".node-help-content")

    def help_title(self) -> str:
        return self.tab.inner_text(".node-help-content h1")

    def help_pictures(self) -> list[int]:
        """Widths of the help panel's pictures; 0 for one that is not found."""
        return self.tab.evaluate("[...document.querySelectorAll('.node-help-content img')].map(i => i.naturalWidth)")

    def close_side_panel(self) -> None:
        self.tab.evaluate("window.app.extensionManager.sidebarTab.activeSidebarTabId = null")

    def fit(self, margin: int = 25) -> None:
        """All nodes in view."""
        self.tab.evaluate(
            """margin => {
                const c = window.app.canvas, ns = window.app.graph.nodes, { width, height } = c.canvas.getBoundingClientRect()
                const x0 = Math.min(...ns.map(n => n.pos[0])), y0 = Math.min(...ns.map(n => n.pos[1] - 30))
                const x1 = Math.max(...ns.map(n => n.pos[0] + n.size[0])), y1 = Math.max(...ns.map(n => n.pos[1] + n.size[1]))
                const k = Math.min(1, (width - 2 * margin) / (x1 - x0), (height - 2 * margin) / (y1 - y0))
                c.ds.scale = k; c.ds.offset = [margin / k - x0, margin / k - y0]; c.setDirty(true, true) }""",
            margin,
        )
        self.tab.wait_for_timeout(500)

    def screenshot(self, path: Path, **options) -> None:
        self.tab.screenshot(path=str(path), **options)

    def screenshot_canvas(self, path: Path) -> None:
        self.tab.locator("#graph-canvas").screenshot(path=str(path))

    def screenshot_node(self, path: Path, margin: int = 12) -> None:
        """The first node alone, with a little of the canvas around it, and the pack's badge above it."""
        box = self.tab.evaluate(
            """() => { const { ds, canvas } = window.app.canvas, [n] = window.app.graph.nodes, at = canvas.getBoundingClientRect()
                return { x: at.x + (n.pos[0] + ds.offset[0]) * ds.scale, y: at.y + (n.pos[1] - 30 + ds.offset[1]) * ds.scale,
                    width: n.size[0] * ds.scale, height: (n.size[1] + 30) * ds.scale } }"""
        )
        box |= {"x": box["x"] - margin, "y": box["y"] - 2 * margin}
        box |= {"width": box["width"] + 2 * margin, "height": box["height"] + 3 * margin}
        self.tab.screenshot(path=str(path), clip=box)

    def close(self) -> None:
        self._browser.close()
        self._playwright.stop()
