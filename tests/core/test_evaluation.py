"""What a table's row says of losses that are known."""

import pytest

from seqlora_core.evaluation import Losses, row


def test_a_row_of_known_losses():
    losses = Losses([0.5, 0.6], [0.6, 0.4], [[0.5, 0.7], [0.5]], 1.1, 0.4)
    found = row("ours", losses, [1.0, 1.0], [0.5, 0.0], 1.0)
    assert (found["n"], found["counted"], found["pairs"]) == (2, 2, 0.4)
    assert found["alone_gain"] == pytest.approx(0.9 / 1.5) and found["generic_drift"] == pytest.approx(0.1)
    assert found["stack_gain"] == pytest.approx(1.0 / 1.5)
    assert found["kept_mean"] == pytest.approx((0.8 + 0.6) / 2) and found["kept_worst"] == pytest.approx(0.6)
    assert found["kept_subset"] == pytest.approx((1.0 + 0.6 + 0.5) / 3)


def test_a_concept_without_a_gain_has_nothing_to_keep():
    """The second one's ordinary LoRA is hardly better than the bare model: any share of that would drown all others"""
    losses = Losses([0.5, 0.99], [0.5, 1.5], [[0.5], [1.5]], 1.0, None)
    found = row("ours", losses, [1.0, 1.0], [0.5, 0.96], 1.0)
    assert (found["counted"], found["kept_mean"], found["kept_worst"], found["kept_subset"]) == (1, 1.0, 1.0, 1.0)
    assert row("short", losses, [1.0, 1.0], [0.99, 0.99], 1.0)["counted"] == 2
