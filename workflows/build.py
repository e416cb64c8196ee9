"""Writes every workflow from one readable description: UI JSON with its picture here, API JSON in api/.

    python workflows/build.py

Widget order is read from the node schemas in tests/nodes/schema.json (a snapshot that a test pins to the real
server's /object_info), so that building needs no server.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCHEMA = json.loads((HERE.parent / "tests" / "nodes" / "schema.json").read_text(encoding="utf-8"))
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
OWN_MODEL = (
    "These run on the pack's tiny demo model.\n\nFor your own: put Load Checkpoint in the place of Demo Model, set the "
    "resolution in Concept Images and the empty latent to your model's (512, 1024), and use a new library name."
)


class Graph:
    """Nodes by name; an input is a plain value (a widget) or (node name, output index) (a link)."""

    def __init__(self, title: str):
        self.title, self.nodes, self.notes = title, {}, []

    def add(self, label: str, kind: str, at: tuple[int, int], size: tuple[int, int], title: str = "", /, **inputs):
        self.nodes[label] = {"kind": kind, "at": at, "size": size, "title": title, "inputs": inputs}

    def note(self, text: str, at: tuple[int, int], size: tuple[int, int] = (320, 180)):
        self.notes.append((text, at, size))

    def ids(self) -> dict[str, int]:
        return {name: i + 1 for i, name in enumerate(self.nodes)}

    def api(self) -> dict:
        """What POST /prompt takes."""
        ids = self.ids()
        out = {}
        for name, node in self.nodes.items():
            inputs = {k: [str(ids[v[0]]), v[1]] if isinstance(v, tuple) else v for k, v in node["inputs"].items()}
            out[str(ids[name])] = {
                "inputs": inputs, "class_type": node["kind"], "_meta": {"title": node["title"] or SCHEMA[node["kind"]]["display_name"]},
            }  # fmt: skip
        return out

    def ui(self) -> dict:
        """What the page opens."""
        ids, links, nodes = self.ids(), [], []
        outgoing: dict[tuple[int, int], list[int]] = {}
        for order, (name, node) in enumerate(self.nodes.items()):
            schema = SCHEMA[node["kind"]]
            slots, values = [], []
            for key, kind, control in schema["inputs"]:
                value = node["inputs"].get(key)
                widget = kind in WIDGETS
                slot = {"name": key, "type": kind, "link": None}
                if widget:
                    slot["widget"] = {"name": key}
                    values.append(value if not isinstance(value, tuple) else "")
                    if control:
                        values.append("fixed")
                if isinstance(value, tuple):
                    source, index = ids[value[0]], value[1]
                    link = len(links) + 1
                    links.append([link, source, index, ids[name], len(slots), kind])
                    outgoing.setdefault((source, index), []).append(link)
                    slot["link"] = link
                slots.append(slot)
            while values and values[-1] is None:  # optional widgets at the end: the page takes their defaults
                values.pop()
            entry = {
                "id": ids[name], "type": node["kind"], "pos": list(node["at"]), "size": list(node["size"]), "flags": {},
                "order": order, "mode": 0, "inputs": slots, "outputs": schema["outputs"],
                "properties": {"Node name for S&R": node["kind"]}, "widgets_values": values,
            }  # fmt: skip
            if node["title"]:
                entry["title"] = node["title"]
            nodes.append(entry)
        for entry in nodes:
            entry["outputs"] = [
                {"name": n, "type": t, "links": outgoing.get((entry["id"], i), [])} for i, (n, t) in enumerate(entry["outputs"])
            ]
        for i, (text, at, size) in enumerate(self.notes):
            nodes.append(
                {"id": len(ids) + i + 1, "type": "Note", "pos": list(at), "size": list(size), "flags": {}, "order": len(ids) + i,
                 "mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text], "color": "#432", "bgcolor": "#653"}
            )  # fmt: skip
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"seqlora/{self.title}")), "revision": 0, "last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes,
            "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4,
        }  # fmt: skip


def teach(
    graph: Graph, name: str, subject: str, trigger: str, noun: str, library: str, x: int, y: int, after: str | None = None
):
    graph.add(
        f"{name}_images", "SeqLoRAConceptImages", (x, y), (320, 170), folder=f"demo/{subject}", resolution=64, captions=""
    )
    graph.add(
        name, "SeqLoRATrainConcept", (x + 370, y), (360, 620), f"Teach {subject}",
        model=("base", 0), clip=("base", 1), vae=("base", 2), images=(f"{name}_images", 0), library=library,
        # a library grows one after another: `after` makes the second concept wait for the first
        name=subject, trigger=trigger, class_noun=noun, rank=4, steps=320, learning_rate=0.002, interference_weight=LAMBDA,
        seed=0, if_trained="use it", batch_size=8, preview_every=50, planned_concepts=32, drift_budget=0.02,
        **({"after": (after, 0)} if after else {}),
    )  # fmt: skip


LAMBDA = 1.0


def draw(graph: Graph, stack: tuple[str, int], text: str, x: int, y: int, prefix: str, seed: int = 1):
    graph.add(
        "apply",
        "SeqLoRAApplyStack",
        (x, y),
        (320, 170),
        model=("base", 0),
        clip=("base", 1),
        stack=stack,
        mode="sum",
        amount=1.0,
    )
    graph.add("positive", "CLIPTextEncode", (x + 370, y), (360, 130), "Prompt", clip=("apply", 1), text=text)
    graph.add("negative", "CLIPTextEncode", (x + 370, y + 180), (360, 100), "Negative prompt", clip=("apply", 1), text="")
    graph.add("latent", "EmptySD3LatentImage", (x + 370, y + 330), (360, 110), width=64, height=64, batch_size=4)
    graph.add(
        "sampler", "KSampler", (x + 780, y), (320, 270), model=("apply", 0), positive=("positive", 0), negative=("negative", 0),
        latent_image=("latent", 0), seed=seed, steps=20, cfg=4.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    graph.add("decode", "VAEDecode", (x + 780, y + 320), (320, 60), samples=("sampler", 0), vae=("base", 2))
    graph.add(
        "bigger",
        "ImageScale",
        (x + 780, y + 430),
        (320, 150),
        image=("decode", 0),
        upscale_method="bicubic",
        width=256,
        height=256,
        crop="disabled",
    )
    graph.add("save", "SaveImage", (x + 1150, y), (420, 460), images=("bigger", 0), filename_prefix=prefix)


def teach_a_concept() -> Graph:
    graph = Graph("teach_a_concept")
    graph.add("base", "SeqLoRADemoModel", (40, 40), (260, 80))
    teach(graph, "teach", "octopus", "octzu", "animal", "workflow_demo", 350, 40)
    graph.add("samples", "PreviewImage", (1140, 40), (420, 400), "References | alone | in the library", images=("teach", 3))
    graph.add("curves", "PreviewImage", (1140, 490), (420, 280), "Loss and interference", images=("teach", 2))
    graph.note(
        "Teaches one concept and adds it to a library.\nRun it again with other pictures, name and trigger to add the next.\n\n"
        + OWN_MODEL,
        (40, 170),
        (260, 330),
    )
    return graph


def teach_then_draw() -> Graph:
    graph = Graph("teach_then_draw")
    graph.add("base", "SeqLoRADemoModel", (40, 40), (260, 80))
    teach(graph, "teach", "octopus", "octzu", "animal", "workflow_demo", 350, 40)
    draw(graph, ("teach", 0), "an octzu animal, blue background", 1140, 40, "seqlora/teach_then_draw")
    graph.note(
        "Teaches a concept (once: later runs use it), then draws with the whole library.\n\n" + OWN_MODEL, (40, 170), (260, 330)
    )
    return graph


def stack_and_draw() -> Graph:
    graph = Graph("stack_and_draw")
    graph.add("base", "SeqLoRADemoModel", (40, 40), (260, 80))
    teach(graph, "first", "octopus", "octzu", "animal", "workflow_demo", 350, 40)
    teach(graph, "second", "penguin", "pengvo", "animal", "workflow_demo", 350, 710, after="first")
    draw(
        graph,
        ("second", 0),
        "an octzu animal on the left and a pengvo animal on the right, yellow background",
        1140,
        40,
        "seqlora/stack_and_draw",
        3,
    )
    graph.add("report", "SeqLoRAInterferenceReport", (1140, 710), (420, 420), stack=("second", 0))
    graph.note(
        "Two concepts in one picture. Each is taught once; later runs use what is in the library.\n\n" + OWN_MODEL,
        (40, 170),
        (260, 330),
    )
    return graph


WORKFLOWS = [teach_a_concept, stack_and_draw, teach_then_draw]


def as_text(data: dict) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def build(folder: Path = HERE) -> None:
    (folder / "api").mkdir(exist_ok=True)
    for make in WORKFLOWS:
        graph = make()
        (folder / f"{graph.title}.json").write_text(as_text(graph.ui()), encoding="utf-8")
        (folder / "api" / f"{graph.title}.json").write_text(as_text(graph.api()), encoding="utf-8")


if __name__ == "__main__":
    build()
