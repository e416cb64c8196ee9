"""The part of a node's schema that workflows depend on, from a server's /object_info.

python -m tests.nodes.snapshot      starts ComfyUI and writes schema.json anew
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("schema.json")
STOCK = (
    "CLIPTextEncode", "EmptySD3LatentImage", "KSampler", "VAEDecode", "SaveImage", "PreviewImage", "ImageScaleBy",
    "PrimitiveStringMultiline",
)  # fmt: skip


def schema_of(info: dict) -> dict:
    """{"display_name", "inputs": [[name, type, has a control-after-generate widget]], "outputs": [[name, type]],
    "defaults": of optional widgets}"""
    inputs, defaults = [], {}
    for part in ("required", "optional"):
        for name in info["input_order"].get(part, []):
            kind, *options = info["input"][part][name]
            control = bool(options and options[0].get("control_after_generate"))
            inputs.append([name, "COMBO" if isinstance(kind, list) else kind, control])
            if part == "optional" and options and "default" in options[0]:
                defaults[name] = options[0]["default"]
    return {
        "display_name": info["display_name"],
        "inputs": inputs,
        "outputs": [[n, t if isinstance(t, str) else "COMBO"] for n, t in zip(info["output_name"], info["output"])],
        "defaults": defaults,
    }


def schemas(object_info: dict) -> dict:
    names = [n for n in sorted(object_info) if n.startswith("SeqLoRA")]
    return {n: schema_of(object_info[n]) for n in [*names, *STOCK]}


def main() -> None:
    from .comfy_server import Server, find_comfyui

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = Server(*find_comfyui(), Path(folder))
        server.stop()
    SNAPSHOT.write_text(json.dumps(schemas(server.info), indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
