"""What we aim at beside what was measured, from the same files as the tables that show it."""

from __future__ import annotations

import re

from .of_pack import training_rows
from .results import load

OURS = ("seqlora_learnt_trigger", "seqlora_learnt_trigger_rate_0.1")  # the first of them that was measured
PLANNED = "method_long_triggers_planned"  # libraries planned for as many as are measured, where the table's is planned for more
KEPT = {  # concepts -> the aim, and the table with the rivals
    2: (None, "method_long_triggers"), 5: (0.95, "method_long_triggers"), 10: (0.93, "method_long_triggers"),
    32: (0.90, "method_long_triggers_32"), 101: (0.85, "method_long_triggers_101"),
}  # fmt: skip
ALONE, WORST, DRIFT, IDENTITY = 0.97, 0.6, 0.02, 0.03
WON_BACK, SPEARMAN = 0.5, 0.8
CHAIN, ONE_FILE, LAYERS = 10, 1.2, 2
TIME, MEMORY, START_UP = 1.10, 1.05, 0.10

Line = tuple[str, str, str, bool]  # what, the aim, what was measured, whether it is met


def aims_table() -> str:
    lines = [*_method(), *_short_triggers(), *_stacking(), *_patching(), *_training()]
    return "\n".join(
        [
            "| what | aim | measured | met |",
            "|---|---|---|---|",
            *(f"| {a} | {b} | {c} | {'yes' if met else '**no**'} |" for a, b, c, met in lines),
        ]
    )


def _method() -> list[Line]:
    lines, planned = [], {r["n"]: r for r in load(PLANNED)["rows"]}
    for count, (kept, table) in KEPT.items():
        here = {r["row"]: r for r in load(table)["rows"] if r["n"] == count}
        r = planned.get(count) or next(here[name] for name in OURS if name in here)
        rate = " learnt at a rate of 0.1" if r["row"] == OURS[1] else ""
        seeds = f"{r['seeds']} seed{'s' if r['seeds'] > 1 else ''}"
        title = f"{count} concepts, planned for {count}, triggers of sixteen tokens{rate}, {seeds}"
        if kept:
            lines.append(_least(f"{title}: kept", kept, r["kept_mean"]))
        if count == 101:
            lines.append(_least("the worst of them", WORST, r["kept_worst"]))
        lines.append(_most("their drift" if kept else f"{title}: drift", DRIFT, r["generic_drift"], "{:.1%}"))
        lines.append(_least("a concept alone, over an ordinary LoRA", ALONE, r["alone_gain"]))
        if count == 10:
            away = abs(r["identity_alone"] - r["identity_stack"])
            lines.append(_most("identity of the stack, away from a concept alone", IDENTITY, away))
        rivals = {n: x["kept_mean"] for n, x in here.items() if not n.startswith("seqlora")}
        ahead = {n: kept for n, kept in rivals.items() if kept > r["kept_mean"]}
        named = "; ".join(f"`{n}` keeps {k:.2f} at {here[n]['generic_drift']:.1%} of drift" for n, k in ahead.items())
        found = named or ("all" if rivals else "none was measured")
        lines.append(("ahead of the rivals that were measured", "all", found, bool(rivals) and not ahead))
    return lines


def _short_triggers() -> list[Line]:
    r = next(r for r in load("demo_other")["rows"] if r["row"] == "seqlora")
    title = "five others on which nothing was tuned, short triggers that are not learnt"
    return [
        _least(f"{title}: kept", 0.95, r["kept_mean"]),
        _least("a concept alone, over an ordinary LoRA", ALONE, r["alone_gain"]),
        _most("their drift", DRIFT, r["generic_drift"], "{:.1%}"),
    ]


def _stacking() -> list[Line]:
    rows = {r["row"]: r for r in load("stacking")["rows"]}
    ours = rows["closed_form"]
    best = max(rows.values(), key=lambda r: r["kept_mean"])
    return [
        _least("ten LoRAs of others: won back of what the plain sum loses", WON_BACK, ours["won_back"], "{:.0%}"),
        _least("the worst of them, above the base model", 0.0, ours["kept_worst"]),
        ("ahead of all rows", "all", f"`{best['row']}` is best", best is ours),
        _least("the report foresees who suffers: rank correlation", SPEARMAN, load("prediction")["spearman"]),
    ]


def _patching() -> list[Line]:
    r = load("patching")
    seconds = {row["row"]: row["seconds"] for row in r["rows"]}
    memory = max(r["memory"]["composing"], r["memory"]["one_weight"]) / r["memory"]["largest_layer"]
    one = seconds["one_file"]
    return [
        _least("patching 101 LoRAs: faster than as many loaders, times", CHAIN, seconds["chained"] / seconds["ours"], "{:.0f}"),
        _most("over one file of their rank", ONE_FILE, seconds["ours"] / one),
        _most("the same where alpha is half the rank, the first time", ONE_FILE, seconds["ours_half_alpha"] / one),
        _most("memory above the adapters, in dense layers", LAYERS, memory, "{:.1f}"),
    ]


def _training() -> list[Line]:
    def of(way: str, key: str) -> dict[str, float]:
        return {n.rpartition(" | ")[0].replace(" | ", " in "): r[key] for n, r in training_rows() if r["row"] == way}

    lines = [
        _all_most("a step of training over the fastest other", TIME, of("ours", "time_ratio")),
        _all_most("the same without replay", TIME, of("ours_no_replay", "time_ratio")),
        _all_most("its memory over the leanest other", MEMORY, of("ours", "memory_ratio")),
        _all_most("its start-up, of 500 steps", START_UP, of("ours", "start_up_share"), "{:.0%}"),
    ]
    within = of("ours_one_batch", "time_ratio")
    return [*lines, *([_all_most("a step with replay within the batch, not beside it", TIME, within)] if within else [])]


def _all_most(what: str, aim: float, found: dict[str, float], form: str = "{:.2f}") -> Line:
    measured = ", ".join(f"{form.format(x)} {name}" for name, x in found.items())
    return what, f"at most {form.format(aim)}", measured, max(found.values()) <= aim


def _least(what: str, aim: float, found: float, form: str = "{:.2f}") -> Line:
    return what, f"at least {form.format(aim)}", _shown(found, aim, found >= aim, form), found >= aim


def _most(what: str, aim: float, found: float, form: str = "{:.2f}") -> Line:
    return what, f"at most {form.format(aim)}", _shown(found, aim, found <= aim, form), found <= aim


def _shown(found: float, aim: float, met: bool, form: str) -> str:
    """With a digit more where a miss would be rounded to the aim"""
    finer = re.sub(r"\d+(?=[f%])", lambda digits: str(int(digits[0]) + 1), form)
    return (form if met or form.format(found) != form.format(aim) else finer).format(found)
