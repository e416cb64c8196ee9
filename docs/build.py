"""Fills the tables of README.md and docs/*.md in from docs/results/*.json.

    python docs/build.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from seqlora_core.tables import markdown  # noqa: E402

RESULTS = ROOT / "docs" / "results"
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "RESULTS.md",
    ROOT / "docs" / "RELIABILITY.md",
    ROOT / "docs" / "MODELS.md",
    ROOT / "demo" / "model" / "MODEL_CARD.md",
]


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def demo_table(name: str = "demo") -> str:
    data = load(name)
    about = data["meta"]
    return markdown(data["rows"]) + (
        f"\n\nFrom `{about['command']}`, seeds {about['seeds']}, {about['device']}, torch {about['versions']['torch']}; "
        f"ordinary LoRAs at learning rate {about['ordinary_rate']:g}, the best of three."
    )


def values(lines: list[str], head: str = "| measured | value |") -> str:
    """A table of two columns from its rows"""
    return "\n".join([head, "|---|---|", *lines])


def base_table() -> str:
    r = load("base")

    def by_style(key: str) -> list[str]:
        name = {"none": "no style"}
        return [f"| of those whose prompt names {name.get(k, k + ' style')} | {v:.0%} |" for k, v in r[key].items()]

    return values(
        [
            f"| one subject ({r['prompts']} prompts, {r['subjects']} subjects): nearest neighbour is the right one | {r['single_right']:.0%} |",
            *by_style("single_right_by_style"),
            f"| the same by raw 16 x 16 pixels, as a control | {r['single_right_by_pixels']:.0%} |",
            f"| two subjects ({r['pairs']} prompts): both found on their sides | {r['pair_both_right']:.0%} |",
            *by_style("pair_both_right_by_style"),
            f"| two subjects: each found on its side | {r['pair_each_right']:.0%} |",
            f"| real pictures of one subject, through the autoencoder alone | {r['autoencoder_single_right']:.0%} |",
            f"| real pictures of two, through the autoencoder alone: both found | {r['autoencoder_pair_both_right']:.0%} |",
        ]
    )


def bound_table() -> str:
    r = load("bound")
    ratio = r["bound_over_quantile"]
    return values(
        [
            f"| (pair, layer) dots | {r['dots']} |",
            f"| promised: inputs above the bound, at most | {r['delta']:.0%} |",
            f"| inputs above it, all together | {r['inputs_above']:.1%} |",
            f"| dots that keep the promise | {r['dots_that_keep_the_promise']:.1%} |",
            f"| inputs above it in the worst dot | {r['worst_dot_above']:.1%} |",
            f"| bound over the measured quantile: median, least, most | {ratio['median']:.2f}, {ratio['least']:.2f}, {ratio['most']:.2f} |",
        ]
    )


def prediction_table() -> str:
    r = load("prediction")
    return values(
        [
            f"| all {r['dots']} concepts of {r['stacks']} random stacks | {r['spearman']:.2f} |",
            f"| among the stacks that one concept is in, mean over concepts | {r['within_concept']:.2f} |",
            f"| among the concepts of one stack (of four or more), mean over stacks | {r['within_stack']:.2f} |",
        ],
        "| rank correlation (Spearman) of predicted and measured | value |",
    )


def stacking_table() -> str:
    data = load("stacking")
    about, lines = data["meta"], []
    head = "| ten LoRAs | kept | worst | won back | generic drift | subsets | pairs | identity | pixel control | seconds |"
    for r in sorted(data["rows"], key=lambda r: -r["kept_mean"]):
        judged = [f"{r[k]:.2f}" if k in r else "-" for k in ("identity_stack", "pixel_control_stack")]
        lines.append(
            f"| {r['row']} | {r['kept_mean']:.2f} | {r['kept_worst']:.2f} | {r['won_back']:.0%} | {r['generic_drift']:+.0%} "
            f"| {r['kept_subset']:.2f} | {r['pairs']:.4f} | {judged[0]} | {judged[1]} | {r['seconds']:.1f} |"
        )
    alone = next((r for r in data["rows"] if "identity_alone" in r), None)
    judge = (
        f" Each alone: identity {alone['identity_alone']:.2f}, pixel control {alone['pixel_control_alone']:.2f}."
        if alone
        else ""
    )
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *lines]) + (
        f"\n\nFrom `{about['command']}`, {about['device']}, torch {about['versions']['torch']}; {about['steps']} steps at "
        f"{about['rate']:g}, the best of {', '.join(about['rates'])}.{judge}"
    )


def without_data_table() -> str:
    data = load("without_data")
    lines = ["| way | kept: two | three | six | worst of six | drift of six |", "|---|---|---|---|---|---|"]
    for r in data["rows"]:
        cells = [f"{r['kept'][n]:.2f}" for n in ("2", "3", "6")]
        lines.append(f"| {r['row']} | {' | '.join(cells)} | {r['worst']:.2f} | {r['generic_drift']:+.0%} |")
    about = data["meta"]
    return "\n".join(lines) + f"\n\nFrom `{about['command']}`, {about['device']}, torch {about['versions']['torch']}."


def patching_table() -> str:
    r = load("patching")
    names = {
        "chained": f"{r['loras']} stock LoRA loaders, chained", "one_file": f"one file of rank {r['loras'] * r['rank']}, stock loader",
        "ours": "our stack", "ours_new_strength": "our stack again, one strength changed",
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
        f"is patched. Largest difference from the chain, over a weight's largest value: {r['difference']:.1e}. From "
        f"`{r['meta']['command']}`, {r['meta']['device']}, torch {r['meta']['versions']['torch']}, {r['layers']} layers in float16.",
    ]
    return "\n".join(lines)


def training_rows() -> list[tuple[str, dict]]:
    """What a row is called, and it"""
    names = {"ours": "ours", "ours_no_replay": "ours, without replay", "native": "TrainLoraNode", "peft": "peft"}
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


def metric_table() -> str:
    sizes = load("models")["metric_bytes"]
    return values([f"| {name} | {size / 1e9:.2f} |" for name, size in sizes.items()], "| model | GB |")


def study_table() -> str:
    lines = [
        f"| {r['depth']} | {r['parameters'] / 1e6:.1f} | {r['samples']:,} | {r['held_out']:.4f} |"
        for r in load("study")["rows"]
    ]
    return "\n".join(["| blocks | million parameters | samples seen | held-out loss |", "|---|---|---|---|", *lines])


def replay_table() -> str:
    r = load("replay_pool")
    lines = [f"| {x['row']} | {x['base_loss']:.4f} | {x['drift']:+.1%} | {x['change']:.4f} |" for x in r["rows"]]
    head = ["| pictures | base loss | drift | mean squared change |", "|---|---|---|---|"]
    return (
        "\n".join([*head, *lines])
        + f"\n\n{r['meta']['concepts']} concepts; a pool of {r['meta']['pool']:,} pictures, decoys among them."
    )


def method_table() -> str:
    """A table for each number of concepts"""
    data, parts = load("method"), []
    for count in sorted({r["n"] for r in data["rows"]}):
        rows = [r for r in data["rows"] if r["n"] == count]
        parts.append(f"**{count} concepts**, {rows[0]['seeds']} seed(s)\n\n{markdown(rows)}")
    rates = ", ".join(f"{k} {v:g}" for k, v in data["meta"]["rates"].items())
    about = f"From `{data['meta']['command']}`, {data['meta']['steps']} steps, {data['meta']['concepts']} concepts; learning rates: {rates}."
    return "\n\n".join([*parts, about])


TABLES = {
    "study": study_table,
    "replay_pool": replay_table,
    "method": method_table,
    "demo": demo_table,
    "demo_other": lambda: demo_table("demo_other"),
    "base": base_table,
    "bound": bound_table,
    "prediction": prediction_table,
    "stacking": stacking_table,
    "without_data": without_data_table,
    "patching": patching_table,
    "training": training_table,
    "training_parts": training_parts_table,
    "reliability": reliability_table,
    "models": models_table,
    "metric": metric_table,
}


def filled(text: str) -> str:
    def table(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.S)


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
