"""The curves of the page: bounded memory, right averages, and a reach back to the start."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keisei.observers.page.curves import Curves


def points(curves: Curves, name: str) -> list[tuple[float, float]]:
    return [(one["t"], one["v"][name]) for one in curves.to_dict()["points"] if name in one["v"]]


def test_values_of_one_bucket_are_averaged():
    """Each complete second is one point; the open one is none yet."""
    curves = Curves()
    for at, value in [(0.1, 1.0), (0.9, 3.0), (1.2, 10.0), (1.3, 20.0), (2.0, 5.0)]:
        curves.add(at, {"x": value})
    assert points(curves, "x") == [(0.0, 2.0), (1.0, 15.0)]
    assert curves.num_closed == 2


def test_values_count_by_their_weight():
    """A rate over a long time counts more than one over a short time."""
    curves = Curves()
    curves.add(0.0, {"x": 1.0}, 3.0)
    curves.add(0.5, {"x": 5.0}, 1.0)
    curves.add(1.0, {})
    assert points(curves, "x") == [(0.0, 2.0)]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_left_out(value):
    """The others of the moment are kept, and the result is JSON."""
    curves = Curves()
    curves.add(0.0, {"bad": value, "good": 1.0})
    curves.add(1.0, {})
    assert curves.to_dict()["points"] == [{"t": 0.0, "v": {"good": 1.0}}]
    json.dumps(curves.to_dict(), allow_nan=False)


def test_names_are_bounded():
    """A learner that makes up names all the time fills no memory; the first names stay."""
    curves = Curves(max_names=3)
    for number in range(1000):
        curves.add(number, {f"name {number}": 1.0, "name 0": 2.0})
    assert curves.to_dict()["names"] == ["name 0", "name 1", "name 2"]


def test_a_point_without_values_is_none():
    """A time in which nothing was measured leaves a gap, and later points have their own time."""
    curves = Curves()
    curves.add(0.0, {"x": 1.0})
    curves.add(100.5, {"x": 2.0})
    curves.add(101.0, {})
    assert points(curves, "x") == [(0.0, 1.0), (100.0, 2.0)]


def test_neighbours_are_merged_when_there_are_too_many():
    """The width doubles, the generation tells so, and the first point is that of the start."""
    curves = Curves(max_points=4)
    for second in range(6):
        curves.add(float(second), {"x": float(second)})
    assert curves.generation == 1
    assert points(curves, "x") == [(0.0, 0.5), (2.0, 2.5)]
    curves.add(6.0, {"x": 6.0})
    assert points(curves, "x") == [(0.0, 0.5), (2.0, 2.5), (4.0, 4.5)]


@given(
    gaps=st.lists(st.floats(0.0, 50.0), min_size=1, max_size=400),
    max_points=st.integers(2, 40),
)
def test_the_memory_is_bounded_and_no_value_is_lost(gaps, max_points):
    """However long it goes on: few points in order, from the first to the last, all counted."""
    curves = Curves(max_points)
    at = 0.0
    for gap in gaps:
        at += gap
        curves.add(at, {"x": 1.0})
    curves.add(at + 1e6, {})
    told = curves.to_dict()["points"]
    times = [one["t"] for one in told]
    assert 1 <= len(told) <= max_points
    assert times == sorted(set(times))
    assert all(one["v"] == {"x": 1.0} for one in told)
    assert sum(totals["x"][1] for _, totals in curves._buckets) == len(gaps)


def test_the_news_continue_what_a_page_has():
    """The newest points and their number tell a page whether it has missed any."""
    curves = Curves()
    for second in range(7):
        curves.add(float(second), {"x": float(second)})
    news = curves.news(2)
    assert (news["generation"], news["closed"], news["names"]) == (0, 6, ["x"])
    assert news["last"] == curves.to_dict()["points"][-2:]
