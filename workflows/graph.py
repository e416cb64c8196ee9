"""A readable description of a graph -> UI JSON (what the page opens), API JSON (what POST /prompt takes), a blueprint.

Widget order is read from the node schemas in tests/nodes/schema.json (a snapshot that a test pins to the real
server's /object_info), so that building needs no server.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path

SCHEMA = json.loads((Path(__file__).resolve().parents[1] / "tests" / "nodes" / "schema.json").read_text(encoding="utf-8"))
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
INPUT_NODE, OUTPUT_NODE = -10, -20  # of a subgraph, by ComfyUI's convention


class Graph:
    """Nodes by name; an input is a plain value (a widget) or (node name, output index) (a link)."""

    def __init__(self, title: str):
        self.title, self.nodes, self.notes = title, {}, []

    def add(self, label: str, kind: str, at: tuple[int, int], size: tuple[int, int], title: str = "", /, **inputs):
        """Optional widgets that are not given take their defaults, as on the page."""
        inputs |= {name: value for name, value in SCHEMA[kind]["defaults"].items() if name not in inputs}
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
        nodes, links = self._nodes_and_links()
        return _page(f"seqlora/{self.title}", nodes, links)

    def blueprint(self, inputs: dict[str, tuple[str, str]], outputs: dict[str, tuple[str, int]]) -> dict:
        """One subgraph node: `inputs` {name: (node, its input)}, in order; `outputs` {name: (node, output index)}."""
        nodes, links = self._nodes_and_links()
        by_id, ids = {n["id"]: n for n in nodes}, self.ids()
        links = [dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link)) for link in links]

        def connect(source, source_slot, target, target_slot, kind):
            links.append(dict(id=len(links) + 1, origin_id=source, origin_slot=source_slot, target_id=target, target_slot=target_slot, type=kind))  # fmt: skip
            return len(links)

        ports_in, ports_out, outer_in, outer_out = [], [], [], []
        for slot, (name, targets) in enumerate(inputs.items()):
            joined = []
            for label, key in [targets] if isinstance(targets, tuple) else targets:
                node = by_id[ids[label]]
                at = next(i for i, s in enumerate(node["inputs"]) if s["name"] == key)
                kind, widget = node["inputs"][at]["type"], "widget" in node["inputs"][at]
                joined.append(connect(INPUT_NODE, slot, node["id"], at, kind))
                node["inputs"][at]["link"] = joined[-1]
            ports_in.append({"id": self._uuid(f"in/{name}"), "name": name, "type": kind, "linkIds": joined})
            outer_in.append({"name": name, "type": kind, "link": None} | ({"widget": {"name": name}} if widget else {}))
        for slot, (name, (label, index)) in enumerate(outputs.items()):
            node = by_id[ids[label]]
            kind = node["outputs"][index]["type"]
            node["outputs"][index]["links"].append(connect(node["id"], index, OUTPUT_NODE, slot, kind))
            ports_out.append({"id": self._uuid(f"out/{name}"), "name": name, "type": kind, "linkIds": [len(links)]})
            outer_out.append({"name": name, "type": kind, "links": []})
        left, right = min(n["pos"][0] for n in nodes), max(n["pos"][0] + n["size"][0] for n in nodes)
        definition = {
            "id": self._uuid("subgraph"), "version": 1, "revision": 0, "config": {}, "name": self.title,
            "state": {"lastGroupId": 0, "lastNodeId": max(by_id), "lastLinkId": len(links), "lastRerouteId": 0},
            "inputNode": {"id": INPUT_NODE, "bounding": [left - 220, 40, 120, 20 * len(inputs) + 40]},
            "outputNode": {"id": OUTPUT_NODE, "bounding": [right + 100, 40, 120, 20 * len(outputs) + 40]},
            "inputs": ports_in, "outputs": ports_out, "widgets": [], "nodes": nodes, "groups": [], "links": links, "extra": {},
        }  # fmt: skip
        outer = {
            "id": max(by_id) + 1, "type": definition["id"], "pos": [0, 0], "size": [320, 26 * (len(inputs) + len(outputs))],
            "flags": {}, "order": 0, "mode": 0, "inputs": outer_in, "outputs": outer_out, "title": self.title,
            "properties": {"proxyWidgets": []}, "widgets_values": [],
        }  # fmt: skip
        return _page(f"seqlora/blueprint/{self.title}", [outer], []) | {"definitions": {"subgraphs": [definition]}}

    def _uuid(self, part: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"seqlora/{self.title}/{part}"))

    def _nodes_and_links(self) -> tuple[list[dict], list[list]]:
        ids, links, nodes = self.ids(), [], []
        outgoing: dict[tuple[int, int], list[int]] = {}
        for order, (name, node) in enumerate(self.nodes.items()):
            schema = SCHEMA[node["kind"]]
            slots, values = [], []
            # the page puts sockets first, then the widgets' sockets, whatever the schema's order
            for key, kind, control in sorted(schema["inputs"], key=lambda entry: entry[1] in WIDGETS):
                value = node["inputs"].get(key)
                slot = {"name": key, "type": kind, "link": None}
                if kind in WIDGETS:
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
        return nodes, links


def _page(name: str, nodes: list[dict], links: list[list]) -> dict:
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)), "revision": 0, "last_node_id": max(n["id"] for n in nodes),
        "last_link_id": len(links), "nodes": nodes, "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip
