"""Preference losses and the reverse KL agree with TRL's and Tunix's own functions, and a planted defect is seen."""

import importlib.util

import pytest

from tunix_torch.crosscheck.job import Job
from tunix_torch.learn import preference

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax", "tunix", "trl")), reason="Tunix or TRL is missing"
)


@pytest.fixture(scope="module")
def table():
    from tunix_torch.crosscheck.run import rows_of

    return lambda: list(rows_of(Job("preferences")))


def test_every_loss_agrees_with_both(table):
    rows = table()
    assert [f"{row.case}: {row.quantity} {row.difference}" for row in rows if row.verdict == "fail"] == []
    cases = {row.case.partition(", label")[0].partition(", temp")[0] for row in rows}
    trl = {f"TRL, {name}" for name in ("dpo", "ipo", "simpo", "orpo", "reverse KL")}
    assert cases == trl | {f"Tunix, {name}" for name in ("dpo", "orpo", "reverse KL")}


def test_a_planted_defect_is_reported_where_it_arises(table, monkeypatch):
    monkeypatch.setattr(preference, "ipo_loss", lambda chosen, rejected, beta: (chosen - rejected - 1 / beta).square())
    wrong = {(row.case, row.quantity) for row in table() if row.verdict == "fail"}
    assert wrong == {("TRL, ipo", "loss"), ("TRL, ipo", "gradient of the inputs")}
