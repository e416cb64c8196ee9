"""Tables of what the pack costs, which models it is proven on, and what it withstands."""

from __future__ import annotations

import json

from .results import load, values


def patching_table() -> str:
    r = load("patching")
    names = {
        "chained": f"{r['loras']} stock LoRA loaders, chained", "one_file": f"one file of rank {r['loras'] * r['rank']}, stock loader",
        "ours": "our stack", "ours_half_alpha": "our stack, of files whose alpha is half their rank",
        "ours_new_strength": "our stack again, one strength changed",
    }  # fmt: skip
    lines = ["| way | preparing, s | patching, s | both, s | over one file |", "|---|---|---|---|---|"]
    one = next(row["seconds"] for row in r["rows"] if row["row"] == "one_file")
    for row in r["rows"]:
        cells = [f"{row[k]:.2f}" for k in ("build", "patch", "seconds")]
        lines.append(f"| {names[row['row']]} | {' | '.join(cells)} | {row['seconds'] / one:.2f} |")
    largest, memory = r["memory"]["largest_layer"], r["memory"]
    chained, ours = (next(row["seconds"] for row in r["rows"] if row["row"] == n) for n in ("chained", "ours"))
    lines += [
        "",
        f"Chained over ours: {chained / ours:.0f}. Memory above the adapters themselves: {memory['composing'] / largest:.2f} of the "
        f"largest layer ({largest / 2**20:.0f} MiB in float32) while composing, {memory['one_weight'] / largest:.2f} while one weight "
        f"is patched. {'The report, which Apply Stack writes too, takes ' + format(r['report'], '.1f') + ' s more. ' if 'report' in r else ''}Largest difference from the chain, over a weight's largest value: {r['difference']:.1e}. From "
        f"`{r['meta']['command']}`, {r['meta']['device']}, torch {r['meta']['versions']['torch']}, {r['layers']} layers in float16.",
    ]
    return "\n".join(lines)


def training_rows() -> list[tuple[str, dict]]:
    """What a row is called, and it"""
    names = {
        "ours": "ours",
        "ours_one_batch": "ours, replay within the batch",
        "ours_no_replay": "ours, without replay",
        "native": "TrainLoraNode",
        "peft": "peft",
    }
    models, hosts = {"demo": "demo model", "sd15": "SD1.5"}, {"diffusers": "diffusers", "comfyui": "ComfyUI"}
    return [(f"{models[r['model']]} | {hosts[r['host']]} | {names[r['row']]}", r) for r in load("training")["rows"]]


def training_table() -> str:
    about = load("training")["meta"]
    lines = [
        "| model | host | way | s a step | over the fastest other | in its host | peak, MiB | over the leanest other | in its host | start-up |",
        "|" + "---|" * 10,
    ]
    for name, r in training_rows():
        cells = ["-" if k not in r else f"{r[k]:.2f}" for k in ("time_ratio", "time_ratio_same_host")]
        more = ["-" if k not in r else f"{r[k]:.2f}" for k in ("memory_ratio", "memory_ratio_same_host")]
        share = f"{r['start_up_share']:.0%}" if "start_up_share" in r else "-"
        lines.append(
            f"| {name} | {r['seconds']:.3f} | {' | '.join(cells)} | {r['bytes'] / 2**20:.0f} | {' | '.join(more)} | {share} |"
        )
    return (
        "\n".join(lines) + f"\n\nFrom `{about['command']}`, {about['device']}, torch {about['versions']['torch']} in diffusers."
    )


def training_parts_table() -> str:
    """Shares of a step of ours"""
    rows = [(name, r) for name, r in training_rows() if r["row"] == "ours"]
    parts = list(rows[0][1]["shares"])
    lines = ["| model | host | " + " | ".join(parts) + " |", "|" + "---|" * (2 + len(parts))]
    for name, r in rows:
        model = name.rsplit(" | ", 1)[0]
        lines.append(f"| {model} | " + " | ".join(f"{r['shares'][p]:.1%}" for p in parts) + " |")
    return "\n".join(lines)


COUNTED = ("kills", "files", "inputs", "prompts")


def reliability_table() -> str:
    lines = ["| script | asked for | done | outcome | failures |", "|---|---|---|---|---|"]
    for r in load("reliability").values():
        done = next(r[k] for k in COUNTED if k in r)
        said = {k: v for k, v in r.items() if k not in ("meta", "wanted", *COUNTED, "failures", "seconds", "state")}
        text = json.dumps(said)[1:-1].replace('"', "").replace("_", " ").replace("{", "").replace("}", "")
        lines.append(
            f"| `{r['meta']['command']}` | {r.get('wanted', done):,} | {done:,} | {text}; {r['seconds']} s | {len(r['failures'])} |"
        )
    return "\n".join(lines)


def models_table() -> str:
    """A line a family, a column a host: its loss on one batch before and after 20 steps"""
    rows = load("models")["rows"]
    hosts = list(dict.fromkeys(r["host"] for r in rows))
    found = {(r["family"], r["host"]): r for r in rows}
    lines = ["| family | layers | " + " | ".join(hosts) + " |", "|" + "---|" * (len(hosts) + 2)]
    for family in dict.fromkeys(r["family"] for r in rows):
        cells, layers = [], ""
        for host in hosts:
            row = found.get((family, host))
            if row is None:
                cells.append("-")
            elif "failed" in row:
                cells.append("no")
            else:
                layers = str(row["layers"])
                good = row["finite"] and row["loss_after"] < row["loss_before"] and row["stock_layers"] == row["layers"]
                good = (
                    good
                    and not row["warnings"]
                    and row["weights_kept"]
                    and row["hooks_left"] == 0
                    and row["stock_differs"] < 1e-3
                )
                cells.append(f"{'' if good else 'no: '}{row['loss_before']:.3f} to {row['loss_after']:.3f}")
        lines.append(f"| {family} | {layers} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def diffusers_table() -> str:
    """A line a family of diffusers: its loss on one batch, and whether the pipeline's own loader does what was trained"""
    held = load("models")["diffusers"]
    lines = [f"| family | {held['host']} | layers | loss | `load_lora_weights` |", "|---|---|---|---|---|"]
    for r in held["rows"]:
        if "failed" in r:
            lines.append(f"| {r['family']} | - | - | no | - |")
            continue
        good = r["finite"] and r["loss_after"] < r["loss_before"] and r["weights_kept"] and r["hooks_left"] == 0
        read = "no loader"
        if r["loader"]:
            alike = r["stock_layers"] == r["layers"] and r["stock_differs"] < 1e-3
            read = f"{r['stock_layers']} layers" if alike else "no"
        loss = f"{'' if good else 'no: '}{r['loss_before']:.4f} to {r['loss_after']:.4f}"
        lines.append(f"| {r['family']} | {r['model']} | {r['layers']} | {loss} | {read} |")
    return "\n".join(lines)


def metric_table() -> str:
    sizes = load("models")["metric_bytes"]
    return values([f"| {name} | {size / 1e9:.2f} |" for name, size in sizes.items()], "| model | GB |")
