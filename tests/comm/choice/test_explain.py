"""Keys as text, and decisions as a table."""

from __future__ import annotations

import dataclasses
import json

from choice_cases import KEY

from odysseus_kernels.comm.choice.measure import ChoiceKey, Decision, explain


def test_keys_are_told_apart_and_stay_the_same() -> None:
    assert json.loads(KEY.text) == list(dataclasses.astuple(KEY))
    assert dataclasses.replace(KEY) == KEY and dataclasses.replace(KEY).text == KEY.text
    for field in dataclasses.fields(ChoiceKey):
        other = dataclasses.replace(KEY, **{field.name: 3 if field.name == "world" else "other"})
        assert other.text != KEY.text and other != KEY
        assert (other.shared == KEY.shared) == (field.name in ("device", "own"))


def test_ratio() -> None:
    assert Decision(KEY, "fused", "measured", {"unfused": 3.0, "fused": 2.0}).ratio == 1.5
    assert Decision(KEY, "fused", "measured", {"fused": 2.0}).ratio is None
    assert Decision(KEY, "fused", "measured", {"unfused": 3.0, "fused": 0.0}).ratio is None
    assert Decision(KEY, "fused", "only").ratio is None


def test_nothing_chosen_yet() -> None:
    assert explain([]) == "No mode has been chosen yet."


def test_table() -> None:
    longer = dataclasses.replace(KEY, operator="linear_reduce_scatter", phase="backward")
    text = explain(
        [
            Decision(KEY, "tiles", "measured", {"unfused": 3e-3, "fused": 2e-3, "tiles": 1.5e-3}),
            Decision(longer, "unfused", "model", {"unfused": 4e-6, "fused": 2.5}, {"tiles": "ValueError: odd rows"}),
            Decision(KEY, "fused", "asked"),
        ]
    )
    head, rule, first, second, third, blank, *below = text.split("\n")
    columns = [head.index(name) for name in ("phase", "shapes", "transport", "mode", "how")]
    for row in (first, second, third):
        assert all(row[column - 2 : column] == "  " and row[column] != " " for column in columns)
    assert head.split()[-4:] == ["unfused", "fused", "tiles", "unfused/mode"]
    assert set(rule) == {"-", " "} and len(rule) == len(head) == len(first)
    assert first.split()[-9:] == ["tiles", "measured", "3.000", "ms", "2.000", "ms", "1.500", "ms", "2.00"]
    assert second.split()[-8:] == ["unfused", "model", "4.0", "us", "2.500", "s", "-", "1.00"]
    assert third.split()[-6:] == ["fused", "asked", "-", "-", "-", "-"]
    assert "x [4, 8] dim 0, weight [5, 8], float32" in first and "symmetric, 2 ranks" in first
    assert blank == ""
    assert [line.partition(":")[0] for line in below[:3]] == ["asked", "measured", "model"]
    assert below[3:] == ["linear_reduce_scatter backward cannot be tiles: ValueError: odd rows"]


def test_variants_of_a_mode_stand_in_its_column() -> None:
    """A mode that was tried with several numbers of pieces shows its best time; the chosen variant is named."""
    key = ChoiceKey("all_gather_linear", "forward", "symmetric", 8, "bfloat16", "x [4, 8] dim 0")
    seconds = {"unfused": 3e-3, "fused": 2.5e-3, "fused/4": 2e-3, "tiles": 2.25e-3}
    table = explain([Decision(key, "fused/4", "measured", seconds)])
    row = table.splitlines()[2]
    assert "fused/4" in row and "2.000 ms" in row and "2.250 ms" in row and "2.500 ms" not in row
    assert row.endswith("1.50")
