"""A real ComfyUI server under hundreds of prompts: tiny training, stacking, errors and interrupts at random.

    python -m tests.reliability.server --count 500

After every failed prompt, and after some others: the same picture as at the start, the model's weights bit for bit, no hook,
no patched module, no function of ours in ComfyUI.  Meanwhile this process takes concepts out of the server's library.
Memory: the median of the server's resident set over the last 20 prompts against that over prompts 81 to 100.
A run that is told to stop (Ctrl-C, SIGTERM) ends with what it saw.
"""

from __future__ import annotations

import collections
import hashlib
import json
import random
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path

from seqlora_core.calibration import calibrate
from seqlora_core.demo_model import DemoModel
from seqlora_core.library import Library

from ..nodes.comfy_server import Failed, Server, find_comfyui
from ..nodes.test_training import BASE, draw, images, pixels, train
from . import ledger
from .prompts import CONCEPTS, LIBRARY, Prompt, Prompts

ALLOWED = 0.02  # share by which memory may grow
FILES = 8  # by how many open files may grow
LOOKS = 0.25  # share of the good prompts after which the model is looked at as well


def start(base: Path) -> Server | str:
    """A server with the nodes that look inside; the reason if there is no ComfyUI."""
    found = find_comfyui()
    if isinstance(found, str):
        return found
    helper = base / "custom_nodes" / "soak_state"
    helper.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("state_node.py"), helper / "__init__.py")
    model = DemoModel()
    folder = base / "models" / "loras" / "seqlora" / LIBRARY
    calibrate(model, (64, 64), 16).save(folder / "calibration.safetensors", model.fingerprint())
    server = Server(*found, base)
    for name, trigger in CONCEPTS.items():
        graph = train(LIBRARY, name, trigger, steps=2, preview_every=0, batch_size=2)
        server.run(graph | {"2": images(f"demo/{name}")})
    return server


def resident(server: Server) -> int:
    """Bytes"""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096


def open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


class Soak:
    def __init__(self, server: Server, seed: int):
        self.server, self.rng, self.number = server, random.Random(seed), 0
        self.loras = server.base / "models" / "loras"
        self.prompts = Prompts(self.rng, self.loras)
        self.count, self.kinds, self.outcomes = 0, collections.Counter(), collections.Counter()
        self.failures: list[str] = []
        self.memory: list[int] = []
        self.files = open_files(server)
        self.wanted = self.look()

    def look(self) -> dict:
        """The picture of the bare model, and its state.

        The state is taken after the picture: ComfyUI leaves a stack's patches in the weights until another model is loaded.
        """
        self.number += 1
        # spaces change nothing but the server's cache key: the picture is drawn anew
        graph = draw(dict(BASE), ["1", 0], ["1", 1], "an octzu animal" + " " * self.number)
        graph["30"] = {"class_type": "SoakModelState", "inputs": {"model": ["1", 0], "after": ["24", 0]}}
        outputs = self.server.run(graph)
        picture = hashlib.sha256(pixels(self.server, outputs).tobytes()).hexdigest()
        return {"picture": picture, **json.loads(outputs["30"]["text"][0])}

    def check_sight(self) -> None:
        """The look must see a stack that is still in the weights: the same hash taken before the bare model has drawn"""
        graph = self.prompts.stack().graph
        graph["30"] = {"class_type": "SoakModelState", "inputs": {"model": ["1", 0], "after": ["24", 0]}}
        if json.loads(self.server.run(graph)["30"]["text"][0])["weights"] == self.wanted["weights"]:
            self.failures.append("the look does not see a stack in the weights")
        self.check("a stack that was seen in the weights")

    def check(self, after: str) -> None:
        found = self.look()
        wrong = [k for k in found if found[k] != self.wanted[k]]
        if wrong:
            self.failures.append(f"after {after}: another {', '.join(wrong)}")

    def step(self) -> None:
        prompt = self.prompts.next()
        self.count += 1
        self.kinds[prompt.kind] += 1
        outcome = self.outcome(prompt)
        self.outcomes[outcome] += 1
        if outcome not in prompt.wanted:
            self.failures.append(f"prompt {self.count}, {prompt.kind}: {outcome}")
        self.tidy(prompt.kind)
        if outcome != "success" or self.rng.random() < LOOKS:
            self.check(f"prompt {self.count}, {prompt.kind}")
        self.memory.append(resident(self.server))

    def outcome(self, prompt: Prompt) -> str:
        try:
            prompt_id = self.server.submit(prompt.graph)
            entry = self.interrupted(prompt_id) if "interrupted" in prompt.wanted else self.server.wait(prompt_id, 600)
        except Failed:
            return "refused"
        kinds = [k for k, _ in entry["status"]["messages"]]
        return "interrupted" if "execution_interrupted" in kinds else entry["status"]["status_str"]

    def interrupted(self, prompt_id: str) -> dict:
        """Its history; an interrupt that came before the prompt began is forgotten by the server, and sent again."""
        for _ in range(20):
            time.sleep(self.rng.uniform(0.0, 2.0))
            self.server.post("/interrupt")
            try:
                return self.server.wait(prompt_id, 15)
            except TimeoutError:
                pass
        raise TimeoutError("a prompt that does not let itself be interrupted")

    def tidy(self, kind: str) -> None:
        """From this process, while the server lives with the same library"""
        library = Library(self.loras / "seqlora" / LIBRARY)
        if "cut" in library.names:
            library.remove("cut")
        shutil.rmtree(library.checkpoints("cut"), ignore_errors=True)
        if kind == "teach" and "fox" in library.names and self.rng.random() < 0.5:
            library.remove("fox")

    def totals(self) -> dict:
        found = {"prompts": self.count, "kinds": dict(self.kinds), "outcomes": dict(self.outcomes), "looks": self.number}
        found |= {"state": {k: v for k, v in self.wanted.items() if k != "picture"}}
        if len(self.memory) >= 120:
            first, last = statistics.median(self.memory[80:100]), statistics.median(self.memory[-20:])
            found |= {"megabytes_after_100": round(first / 2**20), "megabytes_at_the_end": round(last / 2**20)}
            found["growth"] = round(last / first - 1, 4)
            if found["growth"] > ALLOWED:
                self.failures.append(f"memory grew by {found['growth']:.1%}")
        return found | {"failures": self.failures}


def run(count: int, seed: int, base: Path, minutes: float = 1e9) -> dict:
    """Totals of `count` prompts, or of those that `minutes` allow."""
    server = start(base)
    if isinstance(server, str):
        return {"skipped": server, "failures": []}
    end, told = time.time() + 60 * minutes, threading.Event()
    before = [signal.signal(s, lambda *_: told.set()) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        soak = Soak(server, seed)
        soak.check_sight()
        while soak.count < count and time.time() < end and not told.is_set():
            soak.step()
            if soak.count % 20 == 0:
                print(soak.count, dict(soak.outcomes), soak.memory[-1] >> 20, "MiB", soak.failures, flush=True)
        soak.check("the last prompt")
        more = open_files(server) - soak.files
        if more > FILES:
            soak.failures.append(f"{more} more open files than at the start")
    finally:
        server.stop()
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)
    return soak.totals()


if __name__ == "__main__":
    ledger.main("server", 500, "prompts", run)
