"""Tables of what the method and its rivals do to pictures."""

from __future__ import annotations

import statistics

from seqlora_core.tables import markdown

from .results import load, values


def demo_table(name: str = "demo") -> str:
    data = load(name)
    about = data["meta"]
    return markdown(data["rows"]) + (
        f"\n\nFrom `{about['command']}`, seeds {about['seeds']}, {about['device']}, torch {about['versions']['torch']}; "
        f"ordinary LoRAs at learning rate {about['ordinary_rate']:g}, the best of three."
    )


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


def pixel_unet_table() -> str:
    r = load("pixel_unet")
    return values(
        [
            f"| million parameters | {r['parameters'] / 1e6:.1f} |",
            f"| pictures seen in training | {r['samples']:,} |",
            f"| held-out loss | {r['held_out']:.4f} |",
        ]
    )


def study_table() -> str:
    lines = [
        f"| {r['depth']} | {r['parameters'] / 1e6:.1f} | {r['samples']:,} | {r['held_out']:.4f} |"
        for r in load("study")["rows"]
    ]
    return "\n".join(["| blocks | million parameters | samples seen | held-out loss |", "|---|---|---|---|", *lines])


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


def replay_table() -> str:
    r = load("replay_pool")
    lines = [
        f"| {x['row']} | "
        + (f"{x['base_loss']:.4f} | {x['drift']:+.1%}" if "drift" in x else "- | -")
        + f" | {x['change']:.4f} |"
        for x in r["rows"]
    ]
    head = ["| pictures | base loss | drift | mean squared change |", "|---|---|---|---|"]
    return (
        "\n".join([*head, *lines])
        + f"\n\n{r['meta']['concepts']} concepts; a pool of {r['meta']['pool']:,} pictures, decoys among them."
    )


def strengths_table() -> str:
    data = load("strengths")
    lines = [
        f"| {r['strength']:g} | {r['kept_mean']:.2f} | {r['kept_worst']:.2f} | {r['generic_drift']:+.1%} |"
        for r in data["rows"]
    ]
    return "\n".join(["| strength of all | kept | worst | generic drift |", "|---|---|---|---|", *lines])


def together_table() -> str:
    data = load("together")
    rows = {}
    for run in data["runs"]:
        rows.setdefault((run["size"], run["row"]), []).append(run)
    lines = [
        f"| {size} | {row} | "
        + " | ".join(f"{statistics.mean(r[k] for r in runs):.4f}" if k in runs[0] else "-" for k in ("those", "all"))
        + f" | {statistics.mean(r['found'] for r in runs):.0%} | {statistics.mean(r['found_all'] for r in runs):.0%} |"
        for (size, row), runs in sorted(rows.items(), key=lambda item: item[0][0])
    ]
    head = "| concepts in a picture | row | error with those on | with all ten on | found, each | found, all |"
    about = f"From `{data['meta']['command']}`, seeds {data['meta']['seeds']}."
    return "\n".join([head, "|---|---|---|---|---|---|", *lines]) + f"\n\n{about}"


def late_table() -> str:
    data = load("late")
    lines = [
        f"| {r['row']} | {r['steps']} | {r['gain']:.3f} | "
        + (f"{r['share']:.2f} | {r['weight']:.0f} | {r['drift']:+.2%} |" if "share" in r else "1.00 | - | - |")
        for r in data["rows"]
    ]
    head = ["| taught | steps | gain alone | over ordinary | weight at the end | drift added |", "|---|---|---|---|---|---|"]
    about = f"From `{data['meta']['command']}`: {' and '.join(data['meta']['concepts'])}, after {data['meta']['after']} others."
    return "\n".join([*head, *lines]) + f"\n\n{about}"


def editing_table() -> str:
    data = load("editing")
    lines = [
        f"| {r['row']} | {r['concepts']} | {r['alone']:.2f} | {r['kept']:.2f} | {r['worst']:.2f} | {r['generic_drift']:+.1%} | "
        + (f"{r['crosstalk_before']:.0%} to {r['crosstalk_after']:.0%} |" if "lost" in r else "- |")
        for r in data["rows"]
    ]
    head = ["| library | concepts | alone | kept | worst | generic drift | crosstalk |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) + f"\n\nFrom `{data['meta']['command']}`, one seed, {data['meta']['steps']} steps."


def orders_table() -> str:
    """Each concept's kept by the place it was taught at: one column a place, the last line their means"""
    data = load("orders")
    places = range(1, len(data["places"]) + 1)
    lines = [
        f"| {', '.join(r['order'])} | {' | '.join(f'{k:.2f}' for k in r['kept'])} | {r['generic_drift']:+.1%} |"
        for r in data["rows"]
    ]
    head = [f"| order | {' | '.join(f'kept of the {n}.' for n in places)} | generic drift |", "|---" * (len(places) + 2) + "|"]
    mean = f"| mean of the place | {' | '.join(f'{k:.2f}' for k in data['places'])} | |"
    about = f"From `{data['meta']['command']}`, one seed, {data['meta']['steps']} steps, learning rate {data['meta']['learning_rate']:g}."
    return "\n".join([*head, *lines, mean]) + f"\n\n{about}"


def method_table(name: str = "method") -> str:
    """A table for each number of concepts"""
    data, parts = load(name), []
    for count in sorted({r["n"] for r in data["rows"]}):
        rows = [r for r in data["rows"] if r["n"] == count]
        seeds = {r["seeds"] for r in rows}
        said = f"{seeds.pop()} seed(s)" if len(seeds) == 1 else "1 seed, or as many as the row says"
        named = [r if r["seeds"] == 1 else r | {"row": f"{r['row']} ({r['seeds']} seeds)"} for r in rows]
        parts.append(f"**{count} concepts**, {said}\n\n{markdown(named)}")
        spread = [
            f"{r['row']} {r['spread']['kept_mean']:.3f} and {r['spread']['generic_drift']:.2%}" for r in rows if r["spread"]
        ]
        if spread:
            parts.append(f"Standard deviation over seeds of what is kept, and of the drift: {'; '.join(spread)}.")
    rates = ", ".join(f"{k} {v:g}" for k, v in data["meta"]["rates"].items())
    about = f"From `{data['meta']['command']}`, {data['meta']['steps']} steps, {data['meta']['concepts']} concepts; learning rates: {rates}."
    return "\n\n".join([*parts, about])


def scale_table() -> str:
    """One line a row, the numbers of concepts beside one another; the rest for the most.  Not of other rates of the trigger"""
    rows = [r for r in load("method_long_triggers")["rows"] if "_rate_" not in r["row"]]
    counts = sorted({r["n"] for r in rows})
    # libraries planned for as many as are measured: for the most, that is the table's own
    most = [r for r in rows if r["row"] == "seqlora_learnt_trigger" and r["n"] == counts[-1]]
    fewer = load("method_long_triggers_planned")["rows"]
    rows = [r | {"row": "seqlora_learnt_trigger, planned for as many"} for r in (*fewer, *most)] + rows
    head = [
        "row",
        *(f"kept of {n}" for n in counts),
        f"worst of {counts[-1]}",
        f"generic drift, {counts[-1]}",
        f"1-NN, {counts[-1]}",
        "seeds",
    ]
    lines = []
    for row in dict.fromkeys(r["row"] for r in rows):
        found = {r["n"]: r for r in rows if r["row"] == row}
        last = found[counts[-1]]
        kept = [f"{found[n]['kept_mean']:.2f}" for n in counts]
        cells = [
            row,
            *kept,
            f"{last['kept_worst']:.2f}",
            f"{last['generic_drift']:+.1%}",
            f"{last['one_nn_stack']:.0%}",
            str(last["seeds"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])
