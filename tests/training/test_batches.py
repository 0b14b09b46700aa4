"""Batches: a pure order of the data, little padding, and exactly the tokens of the rows."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgetsearch.training.batches import DataOrder, collate, passes
from budgetsearch.training.data.store import TokenSet, writing
from budgetsearch.training.members import Shop


@given(rows=st.integers(1, 200), batch=st.integers(1, 16), seed=st.integers(0, 9))
def test_every_epoch_sees_every_row_once(rows: int, batch: int, seed: int) -> None:
    """Whatever does not divide evenly: positions go on into the next epoch."""
    rng = random.Random(seed)
    order = DataOrder([rng.randint(5, 90) for _ in range(rows)], batch, seed)
    seen: list[int] = []
    step = 0
    while len(seen) < 3 * rows:
        seen += order.step_rows(step)
        step += 1
    assert all(len(order.step_rows(s)) == batch for s in range(step))
    counts = Counter(row for s in range(step) for row in order.step_rows(s))
    assert set(counts) == set(range(rows))
    assert max(counts.values()) - min(counts.values()) <= 2


def test_the_order_is_a_function_of_seed_and_step() -> None:
    """Asked in any order, by a fresh object too; another seed gives another order."""
    lengths = [random.Random(i).randint(5, 90) for i in range(150)]
    one, other = DataOrder(lengths, 8, 3), DataOrder(lengths, 8, 3)
    forwards = [one.step_rows(step) for step in range(60)]
    assert forwards == [other.step_rows(step) for step in reversed(range(60))][::-1]
    assert forwards != [DataOrder(lengths, 8, 4).step_rows(step) for step in range(60)]


def test_rows_of_similar_length_come_together() -> None:
    """Grouping leaves less than a quarter of the padding of a plain shuffle."""
    rng = random.Random(0)
    lengths = [rng.randint(20, 400) for _ in range(2000)]
    order = DataOrder(lengths, 8, 0)
    grouped = sum(waste([lengths[row] for row in order.step_rows(step)]) for step in range(250))
    shuffled = rng.sample(lengths, len(lengths))
    plain = sum(waste(shuffled[start : start + 8]) for start in range(0, 2000, 8))
    assert grouped < plain / 4


@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize("micro", [0, 1, 2, 8])
def test_a_pass_holds_what_so_many_of_the_longest_rows_would_take(micro: int, step: int) -> None:
    """Rows times width stay within it, every row comes once, and no pass could have held one more."""
    rng = random.Random(1)
    lengths = [rng.randint(5, 100) for _ in range(200)]
    order = DataOrder(lengths, 16, 0)
    room = micro * -(-max(lengths) // step) * step
    count = 0
    for number in range(40):
        rows = order.step_rows(number)
        cut = passes(order, rows, micro, step)
        assert rows == [row for part in cut for row in part]
        widths = [-(-max(lengths[row] for row in part) // step) * step for part in cut]
        assert all(
            len(part) == 1 or len(part) * width <= room for part, width in zip(cut, widths, strict=True)
        )
        assert all((len(part) + 1) * width > room for part, width in zip(cut[:-1], widths, strict=False))
        count += len(cut)
    assert micro < 2 or count < 0.9 * 40 * 16 / micro  # short rows fill what long ones would


def waste(lengths: list[int]) -> int:
    """Padding of one batch."""
    return len(lengths) * max(lengths) - sum(lengths)


def test_batches_of_one_length_do_not_come_in_the_order_of_their_lengths() -> None:
    """Short and long batches alternate at random: a rung never sees only the short rows."""
    rng = random.Random(0)
    lengths = [rng.randint(20, 400) for _ in range(2000)]
    order = DataOrder(lengths, 8, 0)
    means = [sum(lengths[row] for row in order.step_rows(step)) / 8 for step in range(32)]
    assert means != sorted(means)
    assert max(means[:8]) - min(means[:8]) > 100


def test_several_answers_of_a_row_are_trained_and_what_stands_between_is_not(tmp_path: Path) -> None:
    """Labels are the trained tokens wherever they stand; the first token of a row has nothing before it."""
    rows = [([1, 2, 3, 4, 5, 6], "011001"), ([7, 8], "11"), ([9, 1, 2], "010")]
    with writing(tmp_path / "rows.safetensors") as writer:
        for ids, mask in rows:
            writer.add(ids, [flag == "1" for flag in mask])
    data = TokenSet(tmp_path / "rows.safetensors")
    batch = collate([data] * 2, [[0], [1, 2]], pad=0)
    assert [2, 3, 6, 8, 1] == batch.labels.tolist()
    assert [0, 1, 4, 6, 12] == batch.places.tolist()
    assert (3, 2) == batch.targets
    assert [rows[i] for i in range(3)] == [
        (ids.tolist(), "".join("01"[int(flag)] for flag in trained))
        for ids, trained in map(data.row, range(3))
    ]
    assert ["rows.safetensors"] == [path.name for path in tmp_path.iterdir()]


def test_a_batch_holds_every_member_and_only_trained_labels(shop: Shop) -> None:
    """Places point at the position before each completion token, through all rows of all members."""
    data, groups = shop.data.train, [[3, 11], [20], [41, 5, 6]]
    batch = collate([data] * len(groups), groups, pad=7)
    assert (2, 1, 3) == batch.rows
    assert batch.ids.shape == (6, max(data.lengths[row] for rows in groups for row in rows))
    flat, expected = batch.ids.flatten(), []
    for i, row in enumerate(row for rows in groups for row in rows):
        ids, trained = data.row(row)
        assert ids.tolist() == batch.ids[i, : len(ids)].tolist()
        assert {7} >= set(batch.ids[i, len(ids) :].tolist())
        expected += ids[trained].tolist()
    assert expected == batch.labels.tolist()
    assert expected == flat[batch.places + 1].tolist()
    assert sum(batch.targets) == len(expected)
    assert [sum(data.lengths[r] for r in rows) for rows in groups] == list(batch.tokens)
