"""Counts under resampling against pairs written out, scikit-learn and NumPy's own draws; what is drawn is kept."""

import numpy as np
import pytest
from sklearn import metrics as sk

from mmkd_jax.evals import bootstrap, draws, tallies


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(draws, "_kept", type(draws._kept)())


def problem(seed, n=40, decimals=1):
    """Positives, scores with many ties, and weights that leave rows out."""
    rng = np.random.default_rng(seed)
    return rng.random(n) < 0.4, np.round(rng.random(n), decimals), bootstrap.draw(n, 12, 100 + seed)


def won_by_pairs(positive, scores, weights):
    above = scores[:, None] > scores[None]
    points = (2 * above + (scores[:, None] == scores[None])) * positive[:, None] * ~positive[None]
    return np.einsum("ri,ij,rj->r", weights.astype(np.int64), points, weights.astype(np.int64))


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_pairs_that_are_ranked_right(decimals):
    for seed in range(5):
        positive, scores, weights = problem(seed, decimals=decimals)
        expected = won_by_pairs(positive, scores, weights)
        np.testing.assert_array_equal(tallies.won(positive, scores, weights), expected)
        np.testing.assert_array_equal(tallies.won(positive, -scores, weights), won_by_pairs(positive, -scores, weights))
        assert (tallies.won(positive, -scores, weights) != expected).any()
    for one_class in (np.zeros(40, bool), np.ones(40, bool)):
        assert (tallies.won(one_class, scores, weights) == 0).all()


def test_sums_do_not_wrap_in_small_weights():
    """Counts of a byte each, whose sums need more."""
    positive, scores = np.arange(400) % 2 == 0, np.arange(400) / 7 % 1
    weights = np.full((3, 400), 200, np.uint8)
    np.testing.assert_array_equal(
        tallies.won(positive, scores, weights), won_by_pairs(positive, scores, weights.astype(np.int64))
    )
    assert tallies.cells(2, positive.astype(int), weights).tolist() == [[40000, 40000]] * 3


def test_precision_equals_scikit_learn():
    for seed in range(4):
        positive, scores, weights = problem(seed)
        drawn = tallies.precision(positive, scores, weights) / (weights @ positive)
        expected = [sk.average_precision_score(positive, scores, sample_weight=one) for one in weights]
        np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-13)


def test_cells_count_drawn_rows():
    weights, cell = bootstrap.draw(30, 7, 0), np.arange(30) % 5 - 1
    found = tallies.cells(6, cell, weights)
    expected = [np.bincount(cell[cell >= 0], one[cell >= 0], 6) for one in weights]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int64
    assert (found[:, 4:] == 0).all()


def test_draws_are_those_of_numpy_and_stay_as_they_are():
    """Intervals that were published rest on these draws."""
    strata = np.array([0, 1, 0, 1, 1, 0, 0])
    rng, expected = np.random.default_rng(5), np.zeros((20, 7), int)
    for stratum, size in ((0, 4), (1, 3)):
        expected[:, strata == stratum] = rng.multinomial(size, np.full(size, 1 / size), size=20)
    for _ in range(2):
        found = bootstrap.draw(7, 20, 5, strata=strata)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.int32
        found += 1  # the caller's own
    with pytest.raises(ValueError, match="read-only"):
        draws.counts(strata, 20, 5)[0, 0] = 9


def test_equal_draws_are_made_once(monkeypatch):
    made, drawn = [], draws._drawn
    monkeypatch.setattr(draws, "_drawn", lambda *asked: made.append(asked) or drawn(*asked))
    alone, halves = np.zeros(50, np.int64), np.arange(50) % 2
    asked = [(alone, 10, 0), (alone, 10, 1), (alone, 11, 0), (halves, 10, 0), (alone[:49], 10, 0)]
    found = [draws.counts(*one) for one in asked]
    assert len(made) == len({one.tobytes() for one in found}) == 5
    assert all(draws.counts(*one) is kept for one, kept in zip(asked, found))
    assert len(made) == 5


def test_only_so_much_is_kept(monkeypatch):
    monkeypatch.setattr(draws, "MOST", 2 * 500)
    alone = np.zeros(50, np.int64)
    first, second = draws.counts(alone, 10, 0), draws.counts(alone, 10, 1)
    assert first.nbytes == 500
    assert draws.counts(alone, 10, 0) is first
    draws.counts(alone, 10, 2)  # the second goes, which was used least recently
    assert draws.counts(alone, 10, 0) is first
    assert draws.counts(alone, 10, 1) is not second
    large = draws.counts(alone, 100, 0)
    assert draws.counts(alone, 100, 0) is not large
    assert len(draws._kept) == 2
