"""A real ComfyUI server under hundreds of prompts: tiny training, stacking, errors and interrupts at random.

    python -m tests.reliability.server --count 500

After every failed prompt: the same picture as at the start, the model's weights bit for bit, no hook, no patched module.
Memory: the median of the server's resident set over the last 20 prompts against that over prompts 81 to 100.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import statistics
import time
from pathlib import Path

from seqlora_core.calibration import calibrate
from seqlora_core.demo_model import DemoModel

from ..nodes.comfy_server import Failed, Server, find_comfyui
from ..nodes.test_training import BASE, draw, images, pixels, train
from . import ledger

CONCEPTS = {"octopus": "octzu", "penguin": "pengvo"}
STACK = {"mode": "sum", "amount": 1.0}
ALLOWED = 0.02  # share by which memory may grow


def start(base: Path) -> Server | str:
    """A server with the node that looks inside; the reason if there is no ComfyUI."""
    found = find_comfyui()
    if isinstance(found, str):
        return found
    helper = base / "custom_nodes" / "soak_state"
    helper.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("state_node.py"), helper / "__init__.py")
    model = DemoModel()
    calibrate(model, (64, 64), 16).save(
        base / "models" / "loras" / "seqlora" / "soak" / "calibration.safetensors", model.fingerprint()
    )
    return Server(*found, base)


def resident(server: Server) -> int:
    """Bytes"""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096


class Soak:
    def __init__(self, server: Server, seed: int):
        self.server, self.rng, self.number = server, random.Random(seed), 0
        self.totals = {"prompts": 0, "kinds": {}, "outcomes": {}, "failures": []}
        self.memory: list[int] = []
        self.wanted = self.look()

    def look(self) -> dict:
        """The picture of the bare model, and its state"""
        self.number += 1
        # spaces change nothing but the server's cache key: the picture is drawn anew
        graph = draw(dict(BASE), ["1", 0], ["1", 1], "an octzu animal" + " " * self.number)
        graph["30"] = {"class_type": "SoakModelState", "inputs": {"model": ["1", 0], "after": ["24", 0]}}
        outputs = self.server.run(graph)
        picture = hashlib.sha256(pixels(self.server, outputs).tobytes()).hexdigest()
        return {"picture": picture, **json.loads(outputs["30"]["text"][0])}

    def prompt(self) -> tuple[str, dict, str]:
        """(kind, graph, what must come of it)"""
        kind = self.rng.choice(("train", "stack", "stack", "draw", "error", "error", "interrupt"))
        name = self.rng.choice(list(CONCEPTS))
        if kind == "train":
            graph = train("soak", name, CONCEPTS[name], steps=2, preview_every=0, if_trained="train again", batch_size=2)
            graph["2"] = images(f"demo/{name}")
            return kind, graph, "success"
        if kind == "interrupt":
            graph = train("soak", "cut", "foxqi", steps=20_000, preview_every=0, batch_size=2, seed=self.rng.randrange(9))
            graph["2"] = images("demo/fox")
            return kind, graph, "ended"
        if kind == "stack":
            graph = BASE | {
                "4": {"class_type": "SeqLoRALibrary", "inputs": {"library": "soak", "concepts": name, "strength": self.rng.choice((0.5, 1.0))}},
                "5": {"class_type": "SeqLoRAApplyStack", "inputs": {"model": ["1", 0], "clip": ["1", 1], "stack": ["4", 0], **STACK}},
            }  # fmt: skip
            return kind, draw(graph, ["5", 0], ["5", 1]), "success"
        if kind == "draw":
            return kind, draw(dict(BASE), ["1", 0], ["1", 1], f"a {self.rng.choice(('castle', 'fish', 'tree'))}"), "success"
        changes = [
            dict(name="../x"),
            dict(trigger="nowhere"),
            dict(library="C:\\x"),
            dict(rank=0),
            dict(name="con"),
            dict(trigger="a\nb"),
        ]
        return kind, train(**({"library": "soak", "name": "bad"} | self.rng.choice(changes))), "failure"

    def step(self) -> None:
        kind, graph, wanted = self.prompt()
        self.totals["prompts"] += 1
        self.totals["kinds"][kind] = self.totals["kinds"].get(kind, 0) + 1
        try:
            prompt_id = self.server.submit(graph)
            if kind == "interrupt":
                time.sleep(self.rng.uniform(0.0, 3.0))
                self.server.post("/interrupt")
            entry = self.server.wait(prompt_id, 600)
            kinds = [k for k, _ in entry["status"]["messages"]]
            outcome = "interrupted" if "execution_interrupted" in kinds else entry["status"]["status_str"]
        except Failed:
            outcome = "refused"
        self.totals["outcomes"][outcome] = self.totals["outcomes"].get(outcome, 0) + 1
        good = outcome == "success"
        if (wanted == "success" and not good) or (wanted == "failure" and good):
            self.totals["failures"].append(f"prompt {self.totals['prompts']}, {kind}: {outcome}")
        if not good:
            found = self.look()
            wrong = [k for k in found if found[k] != self.wanted[k]]
            if wrong:
                self.totals["failures"].append(f"after prompt {self.totals['prompts']}, {kind}: another {', '.join(wrong)}")
        self.memory.append(resident(self.server))


def run(count: int, seed: int, base: Path, minutes: float = 1e9) -> dict:
    """Totals of `count` prompts, or of those that `minutes` allow."""
    server = start(base)
    if isinstance(server, str):
        return {"skipped": server, "failures": []}
    end = time.time() + 60 * minutes
    try:
        for name, trigger in CONCEPTS.items():
            graph = train("soak", name, trigger, steps=2, preview_every=0, batch_size=2)
            server.run(graph | {"2": images(f"demo/{name}")})
        soak = Soak(server, seed)
        while soak.totals["prompts"] < count and time.time() < end:
            soak.step()
            if soak.totals["prompts"] % 20 == 0:
                print(soak.totals["prompts"], soak.totals["outcomes"], soak.memory[-1] >> 20, "MiB", flush=True)
        found = soak.look()
        if found != soak.wanted:
            soak.totals["failures"].append("at the end: another " + ", ".join(k for k in found if found[k] != soak.wanted[k]))
    finally:
        server.stop()
    totals, memory = soak.totals, soak.memory
    totals["state"] = {k: v for k, v in found.items() if k != "picture"}
    if len(memory) >= 120:
        first, last = statistics.median(memory[80:100]), statistics.median(memory[-20:])
        totals |= {
            "megabytes_after_100": round(first / 2**20),
            "megabytes_at_the_end": round(last / 2**20),
            "growth": round(last / first - 1, 4),
        }
        if totals["growth"] > ALLOWED:
            totals["failures"].append(f"memory grew by {totals['growth']:.1%}")
    return totals


if __name__ == "__main__":
    ledger.main("server", 500, "prompts", run)
