"""Values that can be pasted: Hydra's parser gives back what was written."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from bottleneck.config.literal import literal


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        1e-7,
        float("inf"),
        "a",
        "",
        "null",
        "True",
        "nan",
        "a=b, {c}: [d]",
        'with "quotes" and \\',
        "ends in \\",
        "é",
        [1, "x", None],
        {"kind": "mos", "rank": [8, 16], "lr": 1e-3, "bands": []},
        [{"rank": 8}, {"kind": "plif", "limit": 10.0}],
    ],
)
def test_what_is_written_is_read_back(value):
    (override,) = OverridesParser.create().parse_overrides([f"key={literal(value)}"])
    assert override.value() == value and type(override.value()) is type(value)
