"""What a training step costs, beside ComfyUI's own trainer and diffusers with peft: docs/results/training.json.

    python -m benchmarks.training            # Linux; ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI

One model, data, rank and number of steps for all: the demo model, and SD1.5's UNet at its real size with random weights and
small latents.  Each way runs in a process of its own, in one thread, in turns; seconds are the process's own (user and
system), so that what else the machine does does not count; memory is the peak resident set from the loaded model on.

    ours, ours_no_replay     trainer.fit, in diffusers and in a ComfyUI server
    ours_one_batch           the same with the replayed pictures within a batch of the others' size, not beside it
    native                   TrainLoraNode in a ComfyUI server, float32, no checkpointing.  It trains every layer and bias, and
                             knows no other way
    peft                     the step of diffusers' LoRA scripts: peft's adapters on the same layers as ours, AdamW, clipping

Replay (predicting on other prompts what was predicted before) is work that no other does; so ours is measured with it, as
it is by default, with less of it, and without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.training_steps import Memory
from seqlora_core.calibration import picture_count
from seqlora_core.replay import decoy_count
from seqlora_core.tables import meta
from tests.nodes.comfy_server import Failed, Server, find_comfyui

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "training.json"
STEPS = 500  # of the run that start-up is a share of
# replay takes one and a half times the batch, as by default; calibration: pictures drawn here; size: of a user's pictures, which
# says how many a calibration draws.  Without decoys their start-up is reckoned as that of as many pictures of the calibration
MODELS = {
    "demo": {"side": 8, "batch": 8, "replay_batch": 12, "steps": 30, "calibration": 32, "decoys": True, "size": 64},
    "sd15": {"side": 8, "batch": 2, "replay_batch": 3, "steps": 3, "calibration": 1, "decoys": False, "size": 512},
}
ONE_BATCH = {"demo": {"batch": 5, "replay_batch": 3}, "sd15": {"batch": 1, "replay_batch": 1}}
ATTENTION = ("--use-pytorch-cross-attention",)  # what ComfyUI takes by itself on a card of NVIDIA's, and diffusers everywhere
WAYS = [
    ("ours", "diffusers"), ("ours_one_batch", "diffusers"), ("ours_no_replay", "diffusers"), ("peft", "diffusers"),
    ("ours", "comfyui"), ("ours_no_replay", "comfyui"), ("native", "comfyui"),
]  # fmt: skip


def run(way: str, host: str, settings: dict, comfyui) -> dict:
    if host == "comfyui":
        return in_server(way, settings, *comfyui)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.training_steps",
            "ours" if way.startswith("ours") else way,
            json.dumps(settings),
            str(output),
        ]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(output.read_text(encoding="utf-8"))


def in_server(way: str, settings: dict, root: Path, python: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        nodes = base / "custom_nodes" / "seqlora_zz_benchmark"  # after the pack, whose modules it uses
        nodes.mkdir(parents=True)
        for name, copy in (("training_node", "__init__"), ("training_steps",) * 2, ("comfy_sd15",) * 2):
            shutil.copy(ROOT / "benchmarks" / f"{name}.py", nodes / f"{copy}.py")
        server = Server(root, python, base, options=ATTENTION)
        try:
            if way != "native":
                graph = {"1": {"class_type": "SeqLoRABenchmarkOurs", "inputs": {"settings": json.dumps(settings)}}}
                return json.loads(finished(server, graph)["1"]["text"][0])
            finished(server, native(settings, 2))  # opens the model
            memory = Memory(server.process.pid)
            short, long = (seconds(server, native(settings, n)) for n in (3, 2 + settings["steps"]))
            return {"seconds": (long - short) / (settings["steps"] - 1), "peak": memory.peak()}
        finally:
            server.stop()


def native(settings: dict, steps: int) -> dict:
    options = {
        "batch_size": settings["batch"], "grad_accumulation_steps": 1, "steps": steps, "learning_rate": 1e-4,
        "rank": settings["rank"], "optimizer": "AdamW", "loss_function": "MSE", "seed": 0, "training_dtype": "fp32",
        "lora_dtype": "fp32", "algorithm": "LoRA", "gradient_checkpointing": False, "existing_lora": "[None]",
    }  # fmt: skip
    return {
        "1": {"class_type": "SeqLoRABenchmarkInputs", "inputs": {"settings": json.dumps(settings)}},
        "2": {
            "class_type": "TrainLoraNode",
            "inputs": {"model": ["1", 0], "latents": ["1", 1], "positive": ["1", 2], **options},
        },
        "3": {"class_type": "LossGraphNode", "inputs": {"loss": ["2", 2], "filename_prefix": "loss"}},
    }


def finished(server: Server, graph: dict) -> dict:
    """Outputs of a prompt; asks seldom, because answers cost the server time"""
    prompt = server.submit(graph)
    while server.process.poll() is None:
        time.sleep(1)
        entry = server.get(f"/history/{prompt}").get(prompt)
        if entry and entry["status"]["status_str"] == "success":
            return entry["outputs"]
        if entry:
            raise Failed(entry["status"]["messages"][-1][1].get("exception_message", "the prompt failed"))
    raise Failed(server.log_path.read_text(encoding="utf-8")[-2000:])


def seconds(server: Server, graph: dict) -> float:
    """Of the server's processor, for one prompt"""
    before = processor(server.process.pid)
    finished(server, graph)
    return processor(server.process.pid) - before


def processor(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def row(model: str, way: str, host: str, found: list[dict], settings: dict) -> dict:
    """The quickest and the leanest of the repeats; start-up at the number of pictures that a user's calibration has"""
    best = min(found, key=lambda f: f["seconds"])
    out = {"row": way, "model": model, "host": host, "seconds": best["seconds"], "bytes": min(f["peak"] for f in found)}
    out["spread"] = statistics.pstdev(f["seconds"] for f in found)
    if "once" in best:
        size, drawn = (settings["size"],) * 2, best["drawn"] / settings["calibration"]
        out["calibration"] = drawn * picture_count(size)
        out |= {k: best[k] for k in ("step_parts", "once_parts")}
        out["once"] = best["once"] + (0 if settings["decoys"] else drawn * decoy_count(size))
    return out


def ratios(rows: list[dict]) -> None:
    """Adds to ours: over the fastest and the leanest of the others on the same model, in any host and in the same one"""
    for r in rows:
        others = [o for o in rows if o["model"] == r["model"] and not o["row"].startswith("ours")]
        if not others or not r["row"].startswith("ours"):
            continue
        same = [o for o in others if o["host"] == r["host"]] or others
        r["time_ratio"] = r["seconds"] / min(o["seconds"] for o in others)
        r["memory_ratio"] = r["bytes"] / min(o["bytes"] for o in others)
        r["time_ratio_same_host"] = r["seconds"] / min(o["seconds"] for o in same)
        r["memory_ratio_same_host"] = r["bytes"] / min(o["bytes"] for o in same)
        r["start_up_share"] = (r["calibration"] + r["once"]) / (STEPS * r["seconds"])
        r["shares"] = shares(r, rows)


def shares(r: dict, rows: list[dict]) -> dict[str, float]:
    """Of a step: replay is what the step is longer by with it, of which a part makes its targets"""
    parts = dict(r["step_parts"])
    targets = parts.pop("replay's targets")
    plain = next((o for o in rows if (o["row"], o["model"], o["host"]) == ("ours_no_replay", r["model"], r["host"])), r)
    parts["replay's targets"], parts["replay, the rest"] = targets, max(0.0, r["seconds"] - plain["seconds"] - targets)
    parts["forward and backward"] = r["seconds"] - sum(parts.values())
    return {name: value / r["seconds"] for name, value in parts.items()}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="*", choices=[":".join(w) for w in WAYS], default=[":".join(w) for w in WAYS])
    parser.add_argument("--steps", type=int, help="measured; as many as each model's own choice if not given")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    comfyui, ways, rows = find_comfyui(), [tuple(w.split(":")) for w in args.ways], []
    if isinstance(comfyui, str):
        print(comfyui)
        ways = [way for way in ways if way[1] != "comfyui"]
    for model in args.models:
        settings = {"model": model, "rank": 4, "pictures": 8, **MODELS[model]}
        settings["steps"] = args.steps or settings["steps"]
        found: dict[tuple[str, str], list[dict]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, host in ways:
                own = settings | (ONE_BATCH[model] if way == "ours_one_batch" else {})
                found[way, host].append(run(way, host, {**own, "replay": way != "ours_no_replay"}, comfyui))
                print(model, way, host, found[way, host][-1], flush=True)
        rows += [row(model, *way, results, settings) for way, results in found.items()]
    if args.output.exists():  # the rows of models that are not measured now stay
        rows = [r for r in json.loads(args.output.read_text(encoding="utf-8"))["rows"] if r["model"] not in args.models] + rows
    ratios(rows)
    command = " ".join(["python -m benchmarks.training", *(sys.argv[1:] if argv is None else argv)])
    about = meta(command, "cpu, one thread", [0]) | {"settings": MODELS, "start_up_of": STEPS}
    args.output.write_text(json.dumps({"meta": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for r in rows:
        print(json.dumps({k: v for k, v in r.items() if not isinstance(v, dict)}))
    return rows


if __name__ == "__main__":
    main()
