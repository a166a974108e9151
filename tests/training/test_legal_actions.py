"""LegalActions: lists of any length against masks, and sampling over them against softmax."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keisei.training.legal_actions import LegalActions, evaluate_legal, sample_legal

LISTS = [[3, 1], [], [0, 2, 4], [2]]
MASK = [
    [False, True, False, True, False],
    [False] * 5,
    [True, False, True, False, True],
    [False, False, True, False, False],
]


def rows_of(legal):
    bounds = legal.offsets.tolist()
    return [legal.indices[a:b].tolist() for a, b in itertools.pairwise(bounds)]


def test_lists_and_masks_are_the_same():
    """Lists become offsets, masks become sorted lists, and lists become masks again."""
    legal = LegalActions.from_lists(LISTS)
    assert legal.indices.tolist() == [3, 1, 0, 2, 4, 2]
    assert legal.offsets.tolist() == [0, 2, 2, 5, 6]
    assert legal.counts.tolist() == [2, 0, 3, 1]
    assert len(legal) == 4
    assert legal.to_mask(5).tolist() == MASK
    assert rows_of(LegalActions.from_mask(torch.tensor(MASK))) == [sorted(one) for one in LISTS]


def test_rows_are_filled_up_to_a_rectangle():
    """The mask tells which entries of the rectangle are legal actions."""
    indices, valid = LegalActions.from_lists(LISTS).padded()
    assert valid.tolist() == [
        [True, True, False],
        [False, False, False],
        [True, True, True],
        [True, False, False],
    ]
    assert [row[ok].tolist() for row, ok in zip(indices, valid, strict=True)] == LISTS


@pytest.mark.parametrize("lists", [[], [[]], [[], []]])
def test_there_may_be_nothing(lists):
    """No positions, or positions without actions, are a rectangle of one column without any."""
    legal = LegalActions.from_lists(lists)
    assert rows_of(legal) == lists
    assert legal.padded()[1].tolist() == [[False]] * len(lists)
    assert legal.to_mask(3).tolist() == [[False] * 3] * len(lists)


LIST = st.lists(st.integers(0, 20), unique=True, max_size=6)


@settings(max_examples=30, deadline=None)
@given(st.lists(LIST, min_size=1, max_size=6), st.data())
def test_rows_are_picked_like_the_rows_of_a_list(lists, data):
    """Any choice of positions, in any order and repeated, gives their lists; so does a mask."""
    legal = LegalActions.from_lists(lists)
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=8))
    picked = legal.pick(torch.tensor(rows, dtype=torch.int64))
    assert rows_of(picked) == [lists[row] for row in rows]
    keep = data.draw(st.lists(st.booleans(), min_size=len(lists), max_size=len(lists)))
    kept = legal.pick(torch.tensor(keep))
    assert rows_of(kept) == [one for one, is_kept in zip(lists, keep, strict=True) if is_kept]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(LIST, max_size=4), min_size=1, max_size=4))
def test_parts_are_put_together_in_order(parts):
    """The positions of the parts follow each other."""
    whole = LegalActions.cat([LegalActions.from_lists(lists) for lists in parts])
    assert rows_of(whole) == [one for lists in parts for one in lists]


def test_what_cannot_be_lists_is_refused():
    """Wrong dtypes and dimensions, repeated or negative indices, and nothing to put together."""
    good = torch.tensor([0, 1])
    for indices, offsets in ((good.float(), good), (good, good.int()), (good[None], good)):
        with pytest.raises(ValueError, match="must be int64 with one dimension"):
            LegalActions(indices, offsets)
    with pytest.raises(ValueError, match="one entry more"):
        LegalActions(good, good[:0])
    for bad in ([1, 1], [-1]):
        with pytest.raises(ValueError, match="the legal actions of row 1 hold a negative index"):
            LegalActions.from_lists([[0], bad])
    with pytest.raises(ValueError, match="no LegalActions to put together"):
        LegalActions.cat([])
    with pytest.raises(IndexError):
        LegalActions.from_lists([[5]]).to_mask(5)


@settings(max_examples=30, deadline=None)
@given(st.lists(LIST.filter(len), min_size=1, max_size=6), st.booleans())
def test_results_are_those_of_a_softmax_over_each_list(lists, deterministic):
    """Log-probabilities, entropies and gradients, whatever the logits of illegal actions are."""
    torch.manual_seed(0)
    logits = 5 * torch.randn(len(lists), 21)
    legal = LegalActions.from_lists(lists)
    parts = [
        torch.distributions.Categorical(logits=row[one])
        for row, one in zip(logits, map(torch.tensor, lists), strict=True)
    ]
    logits = torch.where(legal.to_mask(21), logits, torch.nan).requires_grad_()
    choices, log_probs = sample_legal(logits, legal, deterministic=deterministic)
    places = [one.index(choice) for one, choice in zip(lists, choices.tolist(), strict=True)]
    expected = [part.logits[place] for part, place in zip(parts, places, strict=True)]
    torch.testing.assert_close(log_probs, torch.stack(expected))
    if deterministic:
        assert places == [int(part.logits.argmax()) for part in parts]
    judged, entropies = evaluate_legal(logits, legal, choices)
    torch.testing.assert_close(judged, torch.stack(expected))
    torch.testing.assert_close(entropies, torch.stack([part.entropy() for part in parts]))
    (gradient,) = torch.autograd.grad(judged.sum(), logits)
    for row, (one, part, place) in enumerate(zip(lists, parts, places, strict=True)):
        exact = torch.eye(len(one))[place] - part.probs
        torch.testing.assert_close(gradient[row][one], exact)
    assert (gradient[~legal.to_mask(21)] == 0).all()


def test_drawn_actions_follow_their_probabilities():
    """Over many draws, and lists of several lengths, each is as frequent as its softmax says."""
    torch.manual_seed(0)
    logits = torch.randn(3, 6)
    lists = [[5, 0], [1, 2, 3, 4], [3]]
    many = LegalActions.cat([LegalActions.from_lists(lists)] * 50_000)
    choices, _ = sample_legal(logits.repeat(50_000, 1), many)
    for row, one in enumerate(lists):
        counts = torch.bincount(choices[row::3], minlength=6) / 50_000
        expected = torch.zeros(6).scatter(0, torch.tensor(one), logits[row][one].softmax(0))
        torch.testing.assert_close(counts, expected, atol=0.008, rtol=0)


def test_a_single_position_is_drawn_from_alike():
    """The short way for one position has the same probabilities."""
    torch.manual_seed(0)
    logits = torch.randn(1, 6)
    legal = LegalActions.from_lists([[5, 0, 2]])
    drawn = [sample_legal(logits, legal) for _ in range(5_000)]
    expected = logits[0][legal.indices].log_softmax(0)
    for place, index in enumerate([5, 0, 2]):
        found = [log_prob for choice, log_prob in drawn if choice.item() == index]
        assert len(found) / 5_000 == pytest.approx(expected[place].exp().item(), abs=0.03)
        torch.testing.assert_close(torch.cat(found), expected[place].expand(len(found)))


@pytest.mark.parametrize("deterministic", [False, True])
def test_impossible_actions_are_never_drawn(deterministic):
    """A logit of minus infinity is a probability of 0, at either end of a list too."""
    logits = torch.full((300, 7), -torch.inf)
    logits[:, 3] = -50.0
    legal = LegalActions.from_lists([[6, 3, 0], [3, 0], [0, 3]] * 100)
    choices, log_probs = sample_legal(logits, legal, deterministic=deterministic)
    assert choices.unique().tolist() == [3]
    assert log_probs.unique().tolist() == [0.0]
    assert evaluate_legal(logits, legal, choices)[1].unique().tolist() == [0.0]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("lists", [[[]], [[1], []], [[], [1]], [[], []]])
def test_nothing_legal_is_no_number(lists, deterministic):
    """A position without actions has no log-probability, wherever it stands."""
    legal = LegalActions.from_lists(lists)
    _, log_probs = sample_legal(torch.zeros(len(lists), 3), legal, deterministic=deterministic)
    assert log_probs.isnan().tolist() == [not one for one in lists]


def test_lists_that_do_not_fit_are_refused():
    """As many lists as rows of logits are needed, and no index beyond them."""
    with pytest.raises(ValueError, match=r"for 4 positions, the logits for \[3\]"):
        sample_legal(torch.zeros(3, 5), LegalActions.from_lists(LISTS))
    with pytest.raises(IndexError, match="indices from 0 to 4, there are logits for 0 … 3"):
        evaluate_legal(torch.zeros(4, 4), LegalActions.from_lists(LISTS), torch.zeros(4).long())
