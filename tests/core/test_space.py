"""The search space: parsing, priors, conditions, and the way to the unit cube and back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetsearch.core.errors import SpaceError
from budgetsearch.core.space.dimensions import Choice, Number
from budgetsearch.core.space.space import Space

KNOBS: dict[str, Any] = {
    "quantization": {"kind": "choice", "values": ["bf16", "nf4"]},
    "rank": {"kind": "choice", "values": [8, 16, 32], "ordered": True, "prior": {"center": 16}},
    "learning_rate": {
        "kind": "float", "low": 1e-5, "high": 1e-3, "log": True, "prior": {"center": 2e-4, "spread": 0.5},
    },
}  # fmt: skip


def space(**extra: Any) -> Space:
    """The three required dimensions, with others beside or in place of them."""
    return Space.parse({"dimensions": {**KNOBS, **extra}}, "test")


FULL = {
    "steps": {"kind": "int", "low": 1, "high": 900, "log": True, "prior": {"center": 30, "spread": 0.6}},
    "layers": {"kind": "int", "low": -2, "high": 3},
    "momentum": {"kind": "float", "low": 0.0, "high": 0.9, "unit": "1", "source": "a paper"},
    "double": {"kind": "choice", "values": [True, False], "when": {"quantization": ["nf4"]}},
    "block": {"kind": "choice", "values": [64, 128], "when": {"double": [True]}},
    "half": {"kind": "tied", "to": "momentum", "factor": 0.5},
    "shadow": {"kind": "tied", "to": "block"},
    "optimizer": {"kind": "constant", "value": "adamw"},
}
units = st.floats(0.0, 1.0, allow_nan=False)


@st.composite
def ranges(draw: st.DrawFn) -> dict[str, Any]:
    """Number dimensions of every sort that parses."""
    log, whole = draw(st.booleans()), draw(st.booleans())
    low = draw(st.integers(1, 50) if whole else st.floats(1e-6, 10.0))
    high = low + draw(st.integers(1, 500) if whole else st.floats(0.01, 100.0))
    raw = {"kind": "int" if whole else "float", "low": low, "high": high, "log": log}
    if draw(st.booleans()):
        center = low + draw(units) * (high - low)
        wide = math.log10(high / low) if log else high - low
        raw["prior"] = {"center": min(high, center), "spread": wide * draw(st.floats(0.2, 3.0))}
    return raw


@given(raw=ranges(), position=units)
@settings(max_examples=150, deadline=None)
def test_every_position_gives_a_value_of_the_range_and_comes_back(
    raw: dict[str, Any], position: float
) -> None:
    """A unit position becomes a valid value; that value's own position gives the value again."""
    found = space(knob=raw)
    unit = {**dict.fromkeys(found.searched, 0.5), "knob": position}
    params = found.from_unit(unit)
    found.validate(params)
    again = found.from_unit(found.to_unit(params))
    assert math.isclose(float(params["knob"]), float(again["knob"]), rel_tol=1e-6, abs_tol=1e-6)
    if raw["kind"] == "float" and params["knob"] not in (raw["low"], raw["high"]):
        assert math.isclose(position, found.to_unit(params)["knob"], abs_tol=1e-5)


@given(raw=ranges())
@settings(max_examples=80, deadline=None)
def test_a_parsed_space_survives_the_way_through_json(raw: dict[str, Any]) -> None:
    """parse(to_dict()) is the same space, also after JSON and with sorted keys."""
    found = space(knob=raw, **FULL)
    text = json.dumps(found.to_dict(), sort_keys=True)
    assert found == Space.parse(json.loads(text))


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_whole_configuration_comes_back_from_the_cube(data: st.DataObject) -> None:
    """from_unit(to_unit(params)) gives the same choices, conditions and ties included."""
    found = space(**FULL)
    params = found.from_unit({name: data.draw(units) for name in found.searched})
    found.validate(params)
    again = found.from_unit(found.to_unit(params))
    assert _close(params, again)


def _close(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(
        math.isclose(one[key], other[key], rel_tol=1e-9, abs_tol=1e-9)
        if isinstance(one[key], float)
        else one[key] == other[key]
        for key in one
    )


def test_the_default_is_the_mode_of_every_prior() -> None:
    """Centres where there is a prior, the first value or the middle of the range where not."""
    expected = {"quantization": "bf16", "rank": 16, "learning_rate": 2e-4, "alpha": 32, "dropout": 0.0}
    assert expected == space().default()


def test_the_default_of_an_ordered_choice_without_a_prior_is_the_middle() -> None:
    """Nobody's favourite is neither the smallest nor the largest."""
    rank = {"kind": "choice", "values": [4, 8, 16, 32], "ordered": True}
    assert 8 == space(rank=rank).default()["rank"]


def test_alpha_and_dropout_have_defaults() -> None:
    """A space that does not name them ties alpha to twice the rank and drops nothing out."""
    params = space().from_unit({"quantization": 0.9, "rank": 0.99, "learning_rate": 0.5})
    assert (64, 0.0) == (params["alpha"], params["dropout"])


def test_only_free_dimensions_are_searched() -> None:
    """Constants, ties and choices of one are not."""
    found = space(quantization={"kind": "choice", "values": ["nf4"]}, **FULL)
    assert ("rank", "learning_rate", "steps", "layers", "momentum", "double", "block") == found.searched


def test_what_no_run_has_of_itself_is_extra() -> None:
    """The composition root can refuse what the recipe does not read."""
    assert ("optimizer",) == space(optimizer=FULL["optimizer"]).extra


def test_the_median_of_a_prior_lies_at_one_half() -> None:
    """A truncated normal with room on both sides is symmetric about its centre, in decades if log."""
    rate = {"kind": "float", "low": 1e-5, "high": 1e-3, "log": True, "prior": {"center": 1e-4, "spread": 0.3}}
    params = space(learning_rate=rate).from_unit({"quantization": 0, "rank": 0, "learning_rate": 0.5})
    assert pytest.approx(1e-4) == params["learning_rate"]


def test_weights_divide_the_unit_interval() -> None:
    """A weight of three against one fills three quarters."""
    found = Choice(name="x", values=("a", "b"), weights=(3.0, 1.0))
    assert ["a", "a", "b", "b"] == [found.value_at(at) for at in (0.0, 0.74, 0.76, 1.0)]


def test_the_weight_of_an_ordered_choice_halves_with_every_step_from_its_centre() -> None:
    """1/2 : 1 : 1/2 : 1/4 in quarters of the whole."""
    found = Choice(name="x", values=(1, 2, 3, 4), ordered=True, center=2)
    edges = [2 / 9, 6 / 9, 8 / 9]
    assert [1, 2, 3, 4] == [found.value_at(at) for at in (edges[0] - 0.01, edges[0], edges[1], edges[2])]


def test_the_ends_of_a_whole_range_get_their_full_share() -> None:
    """Each of three numbers fills a third."""
    found = Number(name="x", low=1, high=3, integer=True)
    assert [1, 2, 2, 3] == [found.value_at(at) for at in (0.32, 0.34, 0.65, 0.68)]


def test_a_conditional_dimension_is_absent_where_its_condition_fails() -> None:
    """Neither it nor what hangs on it or is tied to it appears."""
    found = space(**FULL)
    unit = dict.fromkeys(found.searched, 0.0)
    bf16, nf4 = found.from_unit(unit), found.from_unit({**unit, "quantization": 1.0})
    assert {"double", "block", "shadow"} == set(nf4) - set(bf16)


def test_restricting_drops_values_their_weights_and_what_hung_on_them() -> None:
    """A quantization that does not fit disappears with all that only counted there."""
    quantization = {"kind": "choice", "values": ["fp32", "bf16", "nf4"], "prior": {"weights": [1, 2, 3]}}
    found = space(quantization=quantization, **FULL).restrict("quantization", ["bf16", "fp32", "int8"])
    kept = found["quantization"]
    assert isinstance(kept, Choice)
    assert (("fp32", "bf16"), (1.0, 2.0)) == (kept.values, kept.weights)
    assert not {"double", "block", "shadow"} & {dimension.name for dimension in found.dimensions}
    assert found == Space.parse(found.to_dict())


@pytest.mark.parametrize(
    ("name", "allowed", "words"),
    [
        ("quantization", ["int8"], ["none of ['int8']", "bf16, nf4"]),
        ("learning_rate", [1e-4], ["no list of values"]),
        ("rnak", [8], ["did you mean 'rank'"]),
    ],
)
def test_a_restriction_that_leaves_nothing_is_refused(
    name: str, allowed: list[Any], words: list[str]
) -> None:
    """It says what was there."""
    with pytest.raises(SpaceError) as caught:
        space().restrict(name, allowed)
    assert [] == [word for word in words if word not in str(caught.value)]


FLOAT = KNOBS["learning_rate"]
BROKEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown key names the nearest": (
        {"learning_rate": {**FLOAT, "hgih": 1}}, ["'learning_rate'", "'hgih'", "'high'"],
    ),
    "an unknown kind names the nearest": ({"rank": {"kind": "chioce"}}, ["'rank'", "'choice'"]),
    "no kind": ({"rank": {"values": [1]}}, ["'rank'", "no kind", "constant"]),
    "no mapping": ({"rank": 8}, ["'rank'", "kind: constant"]),
    "a missing key": ({"rank": {"kind": "int", "low": 1}}, ["'rank'", "'high'", "missing"]),
    "a wrong number": ({"learning_rate": {**FLOAT, "low": "abc"}}, ["low must be a number"]),
    "an infinite number": ({"learning_rate": {**FLOAT, "high": math.inf}}, ["high must be a number"]),
    "true is no number": ({"rank": {"kind": "int", "low": True, "high": 8}}, ["low must be a number"]),
    "an empty range": ({"learning_rate": {**FLOAT, "low": 1e-3}}, ["less than high", "constant"]),
    "log from zero": ({"learning_rate": {**FLOAT, "low": 0}}, ["above 0"]),
    "log is a switch": ({"learning_rate": {**FLOAT, "log": "yes"}}, ["true or false"]),
    "a broken int": ({"rank": {"kind": "int", "low": 1.5, "high": 8}}, ["whole numbers"]),
    "a centre outside": (
        {"learning_rate": {**FLOAT, "prior": {"center": 1, "spread": 1}}}, ["center 1", "inside the range"],
    ),
    "a prior too sharp": (
        {"learning_rate": {**FLOAT, "prior": {"center": 1e-4, "spread": 0.01}}}, ["spread must be at least"],
    ),
    "a prior without spread": ({"learning_rate": {**FLOAT, "prior": {"center": 1e-4}}}, ["'spread'"]),
    "an unknown key of a prior": (
        {"learning_rate": {**FLOAT, "prior": {"centre": 1e-4, "spread": 1}}}, ["prior", "'center'"],
    ),
    "a prior that is no mapping": ({"learning_rate": {**FLOAT, "prior": 1e-4}}, ["center and spread"]),
    "weights of another length": (
        {"rank": {"kind": "choice", "values": [1, 2], "prior": {"weights": [1]}}}, ["list of 2 numbers"],
    ),
    "a weight of zero": (
        {"rank": {"kind": "choice", "values": [1, 2], "prior": {"weights": [1, 0]}}}, ["more than 0"],
    ),
    "weights and a centre": (
        {"rank": {"kind": "choice", "values": [1], "prior": {"weights": [1], "center": 1}}}, ["either"],
    ),
    "a centre that is no value": (
        {"rank": {"kind": "choice", "values": [8, 16], "prior": {"center": 32}}}, ["8, 16", "32"],
    ),
    "no values": ({"rank": {"kind": "choice", "values": []}}, ["at least one value"]),
    "a value twice": ({"rank": {"kind": "choice", "values": [8, 8]}}, ["8 twice"]),
    "falling values": ({"rank": {"kind": "choice", "values": [8, 4], "ordered": True}}, ["must rise"]),
    "an unknown quantization": (
        {"quantization": {"kind": "choice", "values": ["nf5"]}}, ["'quantization'", "'nf4'"],
    ),
    "a rank of zero": ({"rank": {"kind": "int", "low": 0, "high": 8}}, ["'rank'", "at least 1"]),
    "a real rank": ({"rank": {**FLOAT, "low": 1, "high": 8, "prior": None}}, ["whole number"]),
    "a learning rate of one": (
        {"learning_rate": {"kind": "constant", "value": 1}}, ["'learning_rate'", "below 1"],
    ),
    "a dropout of one": ({"dropout": {"kind": "choice", "values": [0, 1]}}, ["'dropout'", "below 1"]),
    "a negative alpha": ({"alpha": {"kind": "tied", "to": "rank", "factor": -2}}, ["'alpha'", "above 0"]),
    "a tie to nothing": ({"alpha": {"kind": "tied", "to": "rnak"}}, ["'rnak'", "'rank'"]),
    "a tie to text": ({"alpha": {"kind": "tied", "to": "quantization"}}, ["numeric"]),
    "a slip in a knob's name": ({"dropuot": {"kind": "constant", "value": 0}}, ["'dropuot'", "'dropout'"]),
    "a condition on nothing": (
        {"x": {"kind": "constant", "value": 1, "when": {"quantisation": ["nf4"]}}}, ["'quantization'"],
    ),
    "a condition on no value": (
        {"x": {"kind": "constant", "value": 1, "when": {"quantization": ["nf5"]}}}, ["'nf5'", "'nf4'"],
    ),
    "a condition on a range": (
        {"x": {"kind": "constant", "value": 1, "when": {"learning_rate": [1]}}}, ["no choice above"],
    ),
    "a centre that follows nothing known": (
        {"learning_rate": {**FLOAT, "prior": {"center": 2e-4, "spread": 0.5, "follows": "modle"}}},
        ["follows takes model"],
    ),
    "a centre of something else that follows": (
        {"rank": {**FLOAT, "low": 1, "high": 8, "prior": {"center": 2, "spread": 0.5, "follows": "model"}}},
        ["only the centre of learning_rate"],
    ),
    "a knob on a condition": (
        {"dropout": {"kind": "constant", "value": 0, "when": {"quantization": ["nf4"]}}}, ["every run"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_parse_says_where_and_what_to_do(case: str) -> None:
    """Each message names the space, the place and the way out."""
    extra, words = BROKEN[case]
    with pytest.raises(SpaceError) as caught:
        space(**extra)
    assert [] == [word for word in ["search space 'test'", *words] if word not in str(caught.value)]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([], ["takes a mapping"]),
        ({}, ["quantization, rank, learning_rate"]),
        ({"dimensions": KNOBS, "dimension": {}}, ["'dimension'", "'dimensions'"]),
        ({"dimensions": {"rank": KNOBS["rank"]}}, ["'quantization' is missing"]),
        (
            {"dimensions": {**{k: KNOBS[k] for k in ("quantization", "rank")}, "learning-rte": FLOAT}},
            ["'learning_rate' is missing", "'learning-rte'"],
        ),
        ({"dimensions": [{"name": "rank", **KNOBS["rank"]}] * 2}, ["'quantization' is missing"]),
    ],
)
def test_a_space_without_what_every_run_needs_is_refused(raw: Any, words: list[str]) -> None:
    """The missing dimension is named, with the slip that may stand in its place."""
    with pytest.raises(SpaceError) as caught:
        Space.parse(raw, "test")
    assert [] == [word for word in words if word not in str(caught.value)]


GOOD = {"quantization": "nf4", "rank": 8, "learning_rate": 1e-4, "alpha": 16, "dropout": 0.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 9}, ["'rank'", "8, 16, 32", "9"]),
        ({"rank": True}, ["'rank'"]),
        ({"learning_rate": 1.0}, ["'learning_rate'", "1e-05 to 0.001"]),
        ({"learning_rate": "1e-4"}, ["takes a number"]),
        ({"alpha": 8}, ["tied to rank", "16"]),
        ({"dropout": 0.5}, ["fixed at 0.0"]),
        ({"ranks": 8}, ["did you mean 'rank'"]),
        ({"quantization": "nf5"}, ["did you mean 'nf4'"]),
    ],
)
def test_a_configuration_of_another_space_is_refused(change: dict[str, Any], words: list[str]) -> None:
    """validate and to_unit say which value is wrong and which would do."""
    with pytest.raises(SpaceError) as caught:
        space().to_unit({**GOOD, **change})
    assert [] == [word for word in words if word not in str(caught.value)]


def test_a_configuration_must_be_complete_and_no_more() -> None:
    """A missing value and one whose condition fails are both refused."""
    found = space(double=FULL["double"])
    with pytest.raises(SpaceError, match="'double' is missing"):
        found.validate(GOOD)
    with pytest.raises(SpaceError, match="'double' does not count"):
        found.validate({**GOOD, "quantization": "bf16", "double": True})


@pytest.mark.parametrize("position", [-0.1, 1.1, math.nan])
def test_a_position_outside_the_cube_is_refused(position: float) -> None:
    """The sampler's slip does not become a configuration."""
    with pytest.raises(SpaceError, match="position from 0 to 1"):
        space().from_unit({"quantization": 0.5, "rank": 0.5, "learning_rate": position})
