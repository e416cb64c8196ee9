"""The report's figures against their plain definitions, in float64; its words; its pictures."""

import math
import re
from dataclasses import replace

import pytest
import torch

from seqlora_core import fonts
from seqlora_core.adapter import Adapter, LayerDelta
from seqlora_core.composition import Wishes, project
from seqlora_core.errors import UserError
from seqlora_core.interference import dense_energy, energies, overlaps, residual_energy
from seqlora_core.linalg import orthonormal_basis
from seqlora_core.report import Report, interference_report, percent
from seqlora_core.report_picture import report_picture
from seqlora_core.sketch import sketch
from seqlora_core.statistics import Moments
from seqlora_core.subspace import Metric
from seqlora_core.triggers import shared_triggers

from .test_formulas import IN, OUT, R, anisotropic, delta, moment_of, randn


def stack_of(count, layers=("l", "m")):
    """Adapters of unlike ranks, and what each sees"""
    adapters, moments = {}, {}
    for i in range(count):
        rank = 1 + i % R
        adapters[f"c{i}"] = Adapter(
            {n: LayerDelta(randn(i + 70 * k, rank, IN), randn(i + 9 * k, OUT, rank)) for k, n in enumerate(layers)}
        )
        moments[f"c{i}"] = Moments({n: moment_of(anisotropic(20 + i + 40 * k)) for k, n in enumerate(layers)})
    return adapters, moments


@pytest.mark.parametrize("how", ["dense", "sketched"])
def test_energies_of_all_pairs_equal_those_of_each(how):
    deltas = [LayerDelta(randn(i, 1 + i, IN), randn(i + 9, OUT, 1 + i)) for i in range(3)] + [None]
    moments = [moment_of(anisotropic(i)) for i in range(3)] + [None]
    given = [m if m is None or how == "dense" else sketch(m, 0.9, 5) for m in moments]
    plain = [m if m is None or how == "dense" else g.dense().double() for m, g in zip(moments, given)]
    found = energies(deltas, given)
    for i in range(3):
        for j in range(3):
            exact = residual_energy(deltas[i].up, deltas[i].down, plain[j]).item()
            assert found[i, j].item() == pytest.approx(exact, rel=1e-5 if how == "sketched" else 1e-10)
            assert dense_energy(deltas[i].dense(), given[j]) == pytest.approx(exact, rel=1e-5 if how == "sketched" else 1e-10)
    assert (found[3] == 0).all() and (found[:, 3] == 0).all()


def plain_overlap(first, second) -> float:
    """Mean squared cosine of the principal angles of two row spaces, over what two random ones have"""
    a, b = (torch.linalg.qr(m.mT.double())[0] for m in (first, second))
    return float(torch.linalg.svdvals(a.mT @ b).square().mean() / (max(a.shape[1], b.shape[1]) / a.shape[0]))


def test_overlaps_of_all_pairs_equal_those_of_each():
    deltas = [LayerDelta(randn(i, 1 + i, IN), randn(i + 9, OUT, 1 + i)) for i in range(3)] + [None]
    found = overlaps(deltas)
    for i in range(3):
        for j in range(3):
            assert found[i, j].item() == pytest.approx(plain_overlap(deltas[i].down, deltas[j].down), rel=1e-6)
    assert found[3].isnan().all()


def test_those_that_never_act_at_the_same_time_do_not_disturb_each_other():
    """c0 meets c1 alone: what there is of c2 counts for neither, and c0's figures are those of the two"""
    adapters, moments = stack_of(3)
    meet = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    report = interference_report(adapters, moments, [0.7, 1.0, 1.0], meet=meet)
    both = {n: adapters[n] for n in ("c0", "c1")}
    alone = interference_report(both, moments, [0.7, 1.0])
    assert report.crosstalk[2][:2] == [0.0, 0.0] and report.crosstalk[0][2] == report.overlap[0][2] == 0.0
    assert report.crosstalk[0][:2] == pytest.approx(alone.crosstalk[0])
    assert report.disturbance[2] == 0.0 and min(report.disturbance[:2]) > 0


def test_advice_is_in_the_strengths_that_its_user_set():
    adapters, moments = stack_of(2)
    halved, whole = (
        interference_report(adapters, moments, [0.5 * s, 0.5 * s], asked=asked) for s, asked in ((2.0, None), (2.0, [2.0, 2.0]))
    )
    numbers = [[float(w) for a in r.advice for w in re.findall(r"lower c\d to ([\d.]+)", a)] for r in (halved, whole)]
    assert numbers[0] and numbers[1] == pytest.approx([2 * n for n in numbers[0]], rel=0.02)


def test_the_layer_that_is_named_is_the_one_that_is_left_with_the_projection():
    """As a plain sum all of it is in layer l, of which the projection takes everything"""
    adapters, moments = stack_of(2)
    adapters["c0"].layers["l"] = replace(adapters["c0"].layers["l"], up=30 * adapters["c0"].layers["l"].up)
    without = Adapter({"m": adapters["c0"].layers["m"], "l": replace(adapters["c0"].layers["l"], up=torch.zeros(OUT, 1))})
    report = interference_report(adapters, moments, projected=[without, adapters["c1"]], mode="data")
    pair = next(p for p in report.worst if p["source"] == "c0")
    assert pair["layers"] == ["l"] and pair["layers_after"] == ["m"]
    assert any("most in m:" in a for a in report.advice) and not any(
        "most in l:" in a for a in report.advice if "c0 moves" in a
    )


@pytest.mark.parametrize("mode, order", [("weights", "symmetric"), ("weights", "first"), ("data", "symmetric")])
def test_layers_that_were_never_trained_overlap_with_nothing(mode, order):
    """lora_up is zero there, as in every file's start: neither as a plain sum nor with a projection"""
    adapters, moments = stack_of(2)
    wanted = interference_report({n: Adapter({"l": a.layers["l"]}) for n, a in adapters.items()})
    silent = adapters["c0"].layers["m"]
    adapters["c0"].layers["m"] = LayerDelta(silent.down, torch.zeros_like(silent.up))
    parts = list(adapters.values())
    projected = project(parts, mode, 1.0, list(moments.values()), wishes=Wishes(order))
    report = interference_report(adapters, None, None, projected, mode)
    assert report.overlap[0][1] == pytest.approx(wanted.overlap[0][1])
    part = [Adapter({"l": a.layers["l"]}) for a in projected]
    apart = interference_report(dict(zip(adapters, part)))
    assert report.overlap_after[0][1] == pytest.approx(apart.overlap[0][1], abs=1e-9)
    if mode == "weights":
        assert torch.allclose(projected[1].layers["m"].dense(), parts[1].layers["m"].dense())


def test_crosstalk_and_disturbance_are_shares_of_the_concepts_own_effect():
    adapters, moments = stack_of(3)
    strengths = [1.0, 0.5, -2.0]
    plain = list(adapters.values())
    projected = project(plain, "data", 1.0, list(moments.values()))
    report = interference_report(adapters, moments, strengths, projected, "data")
    own = [sum(residual_energy(d.up, d.down, moments[n][k]) for k, d in a.layers.items()) for n, a in adapters.items()]
    for j, target in enumerate(adapters):
        for i in range(3):
            for stack, matrix in ((plain, report.crosstalk), (projected, report.crosstalk_after)):
                energy = sum(residual_energy(d.up, d.down, moments[target][k]) for k, d in stack[i].layers.items())
                assert matrix[i][j] == pytest.approx(float(strengths[i] ** 2 * energy / own[j]), rel=1e-9)
        for stack, moved in ((plain, report.disturbance), (projected, report.disturbance_after)):
            total = 0.0
            for k in ("l", "m"):
                change = (
                    sum(s * a.layers[k].dense() for s, a in zip(strengths, stack)) - strengths[j] * plain[j].layers[k].dense()
                )
                total += torch.trace(change @ moments[target][k] @ change.mT)
            assert moved[j] == pytest.approx(float(total / (sum(own) / 3)), rel=1e-9)
        kept = sum(residual_energy(d.up, d.down, moments[target][k]) for k, d in projected[j].layers.items())
        assert report.energy_kept[j] == pytest.approx(float(kept / own[j]), rel=1e-9)


@pytest.mark.parametrize("mode", ["sum", "data"])
def test_what_moves_a_concept_is_found_without_the_weights_own_size(monkeypatch, mode):
    """Of few directions in a wide layer, by r x r products: the same figures as by the whole change"""
    generator = torch.Generator().manual_seed(1)
    parts = {n: Adapter({"l": LayerDelta(*(torch.randn(*s, generator=generator) for s in ((2, 64), (48, 2))))}) for n in "abc"}
    moments = {n: Moments({"l": torch.diag(torch.rand(64, generator=generator))}) for n in "abc"}
    strengths, plain = [1.0, 0.5, -2.0], [a.layers["l"].dense() for a in parts.values()]
    projected = project(list(parts.values()), mode, 1.0, list(moments.values()))
    total = sum(s * p.layers["l"].dense() for s, p in zip(strengths, projected))
    own = sum(dense_energy(p, m["l"]) for p, m in zip(plain, moments.values())) / 3
    wanted = [dense_energy(total - s * p, m["l"]) / own for s, p, m in zip(strengths, plain, moments.values())]
    monkeypatch.setattr(LayerDelta, "dense", None)
    report = interference_report(parts, moments, strengths, projected, mode)
    assert (report.disturbance_after or report.disturbance) == pytest.approx(wanted, rel=1e-4)


def test_disjoint_concepts_do_not_disturb():
    metric = Metric.of(moment_of(anisotropic(3)), eps=1e-12)
    both = orthonormal_basis(randn(4, IN, 2 * R))
    adapters = {
        n: Adapter({"l": LayerDelta(metric.down(b), randn(i, OUT, R))})
        for i, (n, b) in enumerate(zip("ab", (both[:, :R], both[:, R:])))
    }
    # inputs of concept "a" lie along its own whitened basis only
    x = randn(5, 100, R) @ both[:, :R].mT @ metric.unwhite
    report = interference_report(adapters, {"a": Moments({"l": moment_of(x)}), "b": Moments({"l": moment_of(anisotropic(8))})})
    assert report.crosstalk[0][0] == report.crosstalk[1][1] == 1 and report.crosstalk[1][0] < 1e-10
    assert report.worst[0]["source"] == "a" and report.disturbance[0] < 1e-10


def test_layers_that_only_some_concepts_have():
    adapters = {"a": Adapter({"l": delta(1)}), "b": Adapter({"l": delta(2), "m": delta(3)})}
    moments = {n: Moments({"l": moment_of(anisotropic(1))}) for n in "ab"}
    report = interference_report(adapters, moments)
    assert report.crosstalk[0][0] == 1 and math.isfinite(report.crosstalk[1][0])


def test_the_cause_of_a_pair_is_the_layer_that_makes_most_of_it():
    adapters, moments = stack_of(2)
    adapters["c0"].layers["m"] = LayerDelta(adapters["c0"].layers["m"].down, 20 * adapters["c0"].layers["m"].up)
    pair = next(p for p in interference_report(adapters, moments).worst if p["source"] == "c0")
    assert pair["layers"] == ["m"]


def test_advice_names_the_strength_at_which_a_pair_is_quiet():
    down, up, moment = randn(1, R, IN), randn(2, OUT, R), moment_of(anisotropic(3))
    adapters = {"quiet": Adapter({"l": LayerDelta(down, 0.1 * up)}), "loud": Adapter({"l": LayerDelta(down, up / 10 * 1.25)})}
    report = interference_report(adapters, {n: Moments({"l": moment}) for n in adapters})
    line = next(a for a in report.advice if a.startswith("loud moves quiet"))
    assert (
        report.crosstalk[1][0] == pytest.approx(1.5625) and "by 156% of its own effect" in line and "lower loud to 0.4" in line
    )
    lowered = interference_report(adapters, {n: Moments({"l": moment}) for n in adapters}, [1.0, 0.39])
    assert lowered.crosstalk[1][0] == pytest.approx(1.5625 * 0.39**2)
    assert not any(a.startswith("loud moves") for a in lowered.advice)
    turned = interference_report(adapters, {n: Moments({"l": moment}) for n in adapters}, [1.0, -1.0])
    assert any("lower loud to -0.4" in a for a in turned.advice)


def test_a_projection_that_does_harm_is_not_advised():
    adapters, moments = (
        {n: Adapter({"l": delta(i)}) for i, n in enumerate("ab")},
        {n: Moments({"l": torch.eye(IN)}) for n in "ab"},
    )
    harm = [adapters["a"].scaled(3.0), adapters["b"].scaled(4.0)]
    report = interference_report(adapters, moments, [0.2, 0.2], harm, "data")
    assert max(report.disturbance) < 0.25 < max(report.disturbance_after)
    assert "as a plain sum: use mode 'sum'." in report.advice[0] and "try Apply Stack's mode 'data'" not in report.text()
    assert "energy on its own inputs that mode 'data' keeps, the least first: a 900%, b 1600%" in report.text()


def test_from_weights_alone_it_says_so_and_counts_in_multiples_of_chance():
    adapters, moments = stack_of(3)
    for known in (None, {"c0": moments["c0"]}):
        report = interference_report(adapters, known, projected=project(list(adapters.values()), "weights"), mode="weights")
        assert report.crosstalk is None and not report.measured and "multiples of chance" in report.text()
        assert report.overlap[0][1] == pytest.approx(
            sum(plain_overlap(adapters["c0"].layers[k].down, adapters["c1"].layers[k].down) for k in "lm") / 2
        )
        assert report.overlap_after[0][1] < 1e-9 and 0 <= report.energy_kept[2] < 1 + 1e-9
        assert any("calibrate" in line for line in report.advice)
    assert "no moments of c1, c2" in report.text()


def test_one_without_a_low_rank_effect_is_in_nobodys_way():
    """A LoRA whose changes are all of other kinds, or zero: no share of nothing is told"""
    moments = {"plain": Moments({"l": torch.eye(IN)}), "dora": Moments({"l": torch.eye(IN)})}
    for known in (moments, None):
        report = interference_report({"plain": Adapter({"l": delta(1)}), "dora": Adapter({})}, known)
        assert "times of its own effect" not in report.text() and "nan" not in report.text()
    alone = interference_report({"dora": Adapter({})}, None, None, [Adapter({})], "weights")
    assert alone.overlap == [[0.0]] and alone.energy_kept == [1.0]


def test_rare_words_of_two_phrases_are_shared_triggers():
    phrases = {"a": "ohwx man", "b": "ohwx woman", "c": "a photo of sks dog", "d": "a photo of a hat"}
    found = shared_triggers({n: {"modelspec.trigger_phrase": p} for n, p in phrases.items()})
    assert found == [("ohwx", ["a", "b"])]


def test_a_report_on_nothing_is_refused():
    for adapters, strengths in (({}, None), ({"a": Adapter({"l": delta(1)})}, [1.0, 1.0])):
        with pytest.raises(UserError, match="give at least one adapter, and a strength for each"):
            interference_report(adapters, strengths=strengths)


def test_shared_triggers():
    ours = {n: {"seqlora.trigger": "ohwx", "seqlora.class_noun": "cat"} for n in "ab"}
    assert shared_triggers(ours) == [("ohwx", ["a", "b"])]
    nouns = {"a": {"modelspec.trigger_phrase": "ohwx man"}, "b": {"modelspec.trigger_phrase": "sks man"}}
    assert shared_triggers(nouns) == []
    assert shared_triggers(nouns | {"c": {"modelspec.trigger_phrase": "OHWX"}}) == [("ohwx", ["a", "c"])]
    assert shared_triggers({"a": {}, "b": {}}) == []
    assert shared_triggers({n: {"seqlora.trigger": "🐱"} for n in "ab"}) == [("🐱", ["a", "b"])]
    adapters = {n: Adapter({"l": delta(1)}, m) for n, m in ours.items()}
    assert any("a and b share the trigger 'ohwx'" in line for line in interference_report(adapters).advice)


def test_text_of_many_concepts_stays_short():
    matrix = [[1.0 if i == j else 0.01 * i for j in range(101)] for i in range(101)]
    names = [f"concept_{i}" for i in range(101)]
    text = Report(names, matrix, matrix, disturbance=[float(i) for i in range(101)]).text()
    assert len(text.splitlines()) < 30 and max(map(len, text.splitlines())) < 120
    assert "concept_100  100 times" in text


def test_percent_reads_well():
    assert [percent(v) for v in (0, 0.001, 0.014, 1.5, 12.3)] == ["0%", "<1%", "1%", "150%", "12 times"]


@pytest.mark.parametrize("count, mode", [(1, "sum"), (2, "data"), (26, "weights")])
def test_pictures_fit_a_preview(count, mode):
    adapters, moments = ({rf"$\x{n}$": v for n, v in of.items()} for of in stack_of(count))  # no formulas
    projected = project(list(adapters.values()), mode, 1.0, list(moments.values()))
    for known in (moments, None):
        picture = report_picture(interference_report(adapters, known, None, projected, mode))
        assert picture.ndim == 4 and picture.shape[2] == 840 and 400 < picture.shape[1] < 1400
        assert 0.2 < picture.mean() < 0.99 and picture.std() > 0.05


def test_letters_come_from_whichever_font_has_them(monkeypatch, recwarn):
    """As Chinese ones do where the system has them; here a letter of a font that comes with matplotlib"""
    monkeypatch.setattr(fonts, "FAMILIES", ("none such", "STIXNonUnicode"))
    adapters, _ = stack_of(2)
    report_picture(interference_report({f"\ue000{n}": a for n, a in adapters.items()}))
    assert not [w for w in recwarn if "missing from font" in str(w.message) or "not found" in str(w.message)]
