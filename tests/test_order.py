"""The block shuffle: permutations, locality, closed form; row indices."""

import numpy as np
import pytest

from mmkd_jax.data import order
from mmkd_jax.data.order import Order, permutation, rows_at
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.errors import InputError

SIZES = [
    (1, 4, 2),
    (3, 4, 2),
    (8, 4, 2),
    (9, 4, 2),
    (31, 4, 3),
    (64, 4, 4),
    (65, 4, 4),
    (100, 1, 1),
    (100, 7, 3),
    (50, 256, 16),
]


@pytest.mark.parametrize(("n", "block", "window"), SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_epoch_is_a_permutation(n, block, window, seed):
    rows, visits = Order(n, seed, block, window).at(np.arange(4 * n))
    for epoch in range(4):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == list(range(n))
    np.testing.assert_array_equal(visits, np.repeat(np.arange(4), n))


@pytest.mark.parametrize(("n", "block", "window"), [(1000, 16, 4), (1001, 16, 4), (1013, 10, 3)])
def test_against_building_the_epoch_in_full(n, block, window):
    """An independent construction: lists of blocks, joined by windows, shuffled one by one."""
    closed = Order(n, 5, block, window)
    blocks = [list(range(start, min(start + block, n))) for start in range(0, n, block)]
    for epoch in (0, 3):
        expected = []
        taken = permutation(len(blocks), "blocks", 5, epoch)
        for number, start in enumerate(range(0, len(blocks), window)):
            members = [row for b in taken[start : start + window] for row in blocks[b]]
            expected += [members[i] for i in permutation(len(members), "rows", 5, epoch, number)]
        np.testing.assert_array_equal(closed.at(epoch * n + np.arange(n))[0], expected)


def test_rows_are_read_near_each_other():
    """Each window's stretch of positions touches only `window` blocks; a full shuffle would touch them all."""
    block, window, n = 16, 4, 1600
    rows, _ = Order(n, 0, block, window).at(np.arange(n))
    for start in range(0, n, block * window):
        assert len(set(rows[start : start + block * window] // block)) == window
    assert len(set(permutation(n, 0)[: block * window] // block)) > 3 * window


def test_epochs_and_seeds_differ():
    n = 512
    epochs = [tuple(Order(n, 0, 16, 4).at(e * n + np.arange(n))[0]) for e in range(5)]
    seeds = [tuple(Order(n, s, 16, 4).at(np.arange(n))[0]) for s in range(5)]
    assert len(set(epochs)) == 5
    assert len(set(seeds)) == 5
    assert Order(n, 0, 16, 4).at(np.arange(n))[0].tolist() == list(epochs[0])


def test_rows_are_mixed():
    """Over many seeds a row lands anywhere: its mean place is the middle, its spread that of a uniform draw."""
    n = 200
    places = np.array([np.argsort(Order(n, seed, 10, 5).at(np.arange(n))[0]) for seed in range(300)])
    assert abs(places.mean(0) - (n - 1) / 2).max() < 5 * (n / np.sqrt(12)) / np.sqrt(300)
    assert places.std(0).min() > 0.8 * n / np.sqrt(12)


def test_any_slicing_gives_the_same():
    """Batches across epoch borders, cut among processes, in any order of steps."""
    closed = Order(37, 4, 5, 2)
    whole, visits = closed.at(np.arange(12 * 20))
    for step in (7, 0, 11, 3):
        rows, seen = rows_at(step, 20, 37, 4, 5, 2)
        np.testing.assert_array_equal(rows, whole[step * 20 : (step + 1) * 20])
        np.testing.assert_array_equal(seen, visits[step * 20 : (step + 1) * 20])
        parts = [closed.at(step * 20 + np.arange(i * 5, (i + 1) * 5))[0] for i in range(4)]
        np.testing.assert_array_equal(np.concatenate(parts), rows)


def test_cost_does_not_grow_with_the_step(monkeypatch):
    """Counted in random numbers drawn for one batch, with nothing remembered."""
    drawn = []
    plain = order.permutation
    monkeypatch.setattr(order, "permutation", lambda count, *key: (drawn.append(count), plain(count, *key))[1])

    def cost(step):
        drawn.clear()
        order._blocks.cache_clear()
        order._window.cache_clear()
        rows_at(step, 256, 100_000, 0)
        return sum(drawn)

    bound = 2 * (-(-100_000 // 256) + 2 * 16 * 256)  # at most two epochs of blocks, two windows in each
    assert max(cost(step) for step in (0, 1, 390, 391, 10**6, 10**12)) <= bound


def test_wrong_numbers():
    for arguments in ((0, 1), (1, 1, 0), (1, 1, 1, 0)):
        with pytest.raises(InputError, match="at least one row"):
            Order(*arguments)


def test_values_are_fixed():
    """The order is part of what a checkpoint means: these numbers must never change."""
    assert permutation(8, "rows", 1, 2, 3).tolist() == [5, 7, 4, 6, 1, 3, 2, 0]
    assert rows_at(3, 8, 20, 7, 4, 2)[0].tolist() == [8, 10, 3, 2, 7, 6, 5, 4]


def test_row_index_round_trip(tmp_path):
    index = RowIndex(np.array([3, 1, 2]), "abc", "busi.train", {"by": "hand"})
    index.save(tmp_path / "a.npz")
    again = RowIndex.load(tmp_path / "a.npz")
    assert again.rows.tolist() == [3, 1, 2]
    assert again.rows.dtype == np.int64
    assert (again.hash, again.name, again.set_hash, again.made) == (index.hash, "busi.train", "abc", {"by": "hand"})
    first = (tmp_path / "a.npz").read_bytes()
    again.save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == first


def test_row_index_hash_is_of_rows_and_set():
    base = RowIndex(np.array([1, 2]), "s", "a")
    assert base.hash == RowIndex(np.array([1, 2], np.int32), "s", "b", {"x": 1}).hash
    assert base.hash != RowIndex(np.array([2, 1]), "s", "a").hash
    assert base.hash != RowIndex(np.array([1, 2]), "t", "a").hash


def test_row_index_refuses(tmp_path):
    for rows in ([0.5], [[1]], [-1]):
        with pytest.raises(InputError, match="row index 'a'"):
            RowIndex(np.array(rows), "s", "a")
    with pytest.raises(InputError, match="does not exist"):
        RowIndex.load(tmp_path / "a.npz")
    RowIndex(np.arange(100), "s", "a").save(tmp_path / "a.npz")
    data = bytearray((tmp_path / "a.npz").read_bytes())
    for damaged in (data[:-30], data[:200], b"", data.replace((50).to_bytes(8, "little"), (51).to_bytes(8, "little"))):
        (tmp_path / "a.npz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"a\.npz"):
            RowIndex.load(tmp_path / "a.npz")
