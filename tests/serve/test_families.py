"""The walk over Transformers' causal LMs, and the table in docs/ that it writes."""

from __future__ import annotations

import pytest
import transformers

from bottleneck.backbone.tiny_configs import FAMILIES
from bottleneck.core.environment import cores
from bottleneck.serve import families
from conftest import ROOT

TABLE = ROOT / "docs" / "families.md"
ROWS = {line.split(" | ")[0].removeprefix("| "): line for line in TABLE.read_text().splitlines() if " | " in line}


def test_the_table_is_of_the_installed_transformers():
    """A new version, with new families, needs a new walk: `python -m bottleneck.serve.families --write FILE`."""
    text = TABLE.read_text()
    assert f"Transformers {transformers.__version__} maps {len(FAMILIES)} model types" in text
    assert set(FAMILIES) <= ROWS.keys()


@pytest.mark.parametrize("family", ["llama", "gemma2", "minicpm3", "cpmant", "dbrx"])
def test_rows_of_the_table_hold(family):
    """Supported, capped, scaled, refused, untried."""
    (outcome,) = families.walk_all([family])
    assert outcome.row() == ROWS[family]


def test_a_wrong_reference_loss_is_an_outcome(monkeypatch):
    """A backbone whose reference loss is wrong is not listed as supported."""
    plain = families.full_head_loss
    monkeypatch.setattr(families, "full_head_loss", lambda *a: plain(*a) * 1.001)
    (outcome,) = families.walk_all(["llama"])
    assert "its reference loss is" in outcome.float32


@pytest.mark.slow
def test_the_table_is_current():
    """Every family, in two dtypes: loaded, reference loss, trained, exported, loaded again."""
    outcomes = list(families.walk_all(FAMILIES, cores()))
    assert families.table(outcomes).splitlines() == TABLE.read_text().splitlines()
    assert sum(o.float32 == families.SUPPORTED for o in outcomes) >= 165
    trained = [o for o in outcomes if o.float32 == families.SUPPORTED]
    # HY-V4 in bfloat16 does not come back as it was saved, and is refused
    assert {o.family for o in trained if o.export != families.SUPPORTED} <= {"hy_v4"}
