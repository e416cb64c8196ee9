"""A real ComfyUI server for tests: found, started with this pack, spoken to over HTTP and websocket."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]
# what ComfyUI reads of the pack
PARTS = ("__init__.py", "pyproject.toml", "nodes", "seqlora_core", "workflows", "subgraphs", "web", "locales", "demo")


def find_comfyui() -> tuple[Path, str] | str:
    """(checkout, python that runs it), or the reason why there is none."""
    candidates = [os.environ.get("COMFYUI_PATH"), str(Path.home() / "comfy" / "ComfyUI")]
    for candidate in filter(None, candidates):
        root = Path(candidate)
        if (root / "main.py").exists():
            pythons = [os.environ.get("COMFYUI_PYTHON"), str(root / ".venv" / "bin" / "python"), sys.executable]
            return root, next(p for p in pythons if p and Path(p).exists())
    return "no ComfyUI: set COMFYUI_PATH, or put a checkout at ~/comfy/ComfyUI"


def run_in_comfyui(script: Path, *arguments) -> None:
    """A script in ComfyUI's own python, with the checkout before its other arguments; skips the test without ComfyUI."""
    import pytest

    found = find_comfyui()
    if isinstance(found, str):
        pytest.skip(found)
    root, python = found
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, str(script), str(root), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


class Failed(Exception):
    """A prompt that ended in execution_error; str() is the message that a user sees."""


class Server:
    """ComfyUI on a private base directory, with this pack as its only custom node; options: more of its command line."""

    def __init__(self, root: Path, python: str, base: Path, source_pack: Path = PACK, options: tuple[str, ...] = ()):
        self.base, self.log_path = base, base / "server.log"
        pack = base / "custom_nodes" / "seqlora"
        pack.mkdir(parents=True)
        for part in PARTS:
            source = source_pack / part
            if source.is_dir():
                shutil.copytree(
                    source, pack / part, ignore=shutil.ignore_patterns("cache", "__pycache__", "*.stats.safetensors")
                )
            elif source.exists():
                shutil.copy(source, pack / part)
        # a user's profile that the page has seen before: no tour, nothing missing
        user = base / "user" / "default"
        for folder in ("workflows", "subgraphs"):
            (user / folder).mkdir(parents=True, exist_ok=True)
        (user / "user.css").write_text("")
        (user / "comfy.templates.json").write_text("[]")
        settings = {
            "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False,
            "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0,
        }  # fmt: skip
        (user / "comfy.settings.json").write_text(json.dumps(settings))
        for folder in ("input", "output", "models/loras"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        command = [
            python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base),
            "--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--preview-method", "none",
            *options,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.log = open(self.log_path, "w")
        self.process = subprocess.Popen(command, cwd=root, env=environment, stdout=self.log, stderr=subprocess.STDOUT)
        self.client = uuid.uuid4().hex
        self._wait()

    def _wait(self) -> None:
        for _ in range(1500):  # five minutes: a busy machine
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended at start:\n{self.log_path.read_text()[-3000:]}")
            try:
                self.info = self.get("/object_info")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        raise RuntimeError("ComfyUI did not start")

    def get(self, path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.loads(answer.read())

    def post(self, path: str, data: dict | None = None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data or {}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            body = answer.read()
            return json.loads(body) if body else {}

    def submit(self, prompt: dict) -> str:
        """Queue an API-format prompt; HTTP 400 becomes Failed with the server's words."""
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self.client})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise Failed(error.read().decode()) from error

    def wait(self, prompt_id: str, timeout: float = 300) -> dict:
        """The history entry, once the prompt has ended."""
        end = time.time() + timeout
        while time.time() < end:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history and history[prompt_id].get("status"):
                return history[prompt_id]
            time.sleep(0.1)
        raise TimeoutError(f"prompt {prompt_id} still runs after {timeout} s")

    def run(self, prompt: dict, timeout: float = 300) -> dict:
        """Outputs by node id; raises Failed with the message of execution_error."""
        entry = self.wait(self.submit(prompt), timeout)
        for kind, data in entry["status"]["messages"]:
            if kind == "execution_error":
                raise Failed(data["exception_message"])
        assert entry["status"]["status_str"] == "success", entry["status"]
        return entry["outputs"]

    def picture(self, image: dict) -> bytes:
        query = f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{query}", timeout=30) as answer:
            return answer.read()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()
