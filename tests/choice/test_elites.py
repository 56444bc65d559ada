"""Archives of elites: cells, who takes them, and parents drawn as the formula says."""

from __future__ import annotations

import numpy as np
import pytest

from plures.choice.elites import Archives, Grid

GRID = Grid((0.0, 0.0, 0.0), (1.0, 2.0, 4.0), 4)


def filled() -> Archives:
    made = Archives.empty(GRID)
    for who, scores in enumerate([(0.2, 0.3, 3.9), (0.9, 1.9, 0.1), (0.5, 1.1, 2.2), (0.4, 0.2, 3.5)]):
        made.insert(who, scores)
    return made


def test_a_cell_is_the_bins_of_the_other_tasks() -> None:
    assert GRID.cell((0.9, 1.1, 0.1), 0) == (2, 0)
    assert GRID.cell((0.9, 1.1, 0.1), 2) == (3, 2)
    assert GRID.cell((0.25, 0.5, 1.0001), 0) == (0, 1)  # on an edge: the bin below
    assert GRID.cell((-5.0, 9.0, -5.0), 1) == (0, 0) and GRID.cell((7.0, 9.0, 7.0), 1) == (3, 3)
    edges = np.linspace(0, 4, 5)  # the authors' bins, by numpy
    for value in (-1.0, 0.0, 0.3, 1.0, 2.5, 4.0, 9.0):
        want = min(max(0, int(np.digitize(value, edges, right=True)) - 1), 3)
        assert GRID.cell((0.5, 0.5, value), 0)[1] == want


def test_a_grid_leaves_room_above_the_first_scores() -> None:
    made = Grid.around([(1.0, -4.0), (3.0, -4.0)], 5)
    assert made.least == (1.0, -4.0) and made.most == (4.0, -3.5) and made.bins == 5


def test_the_better_one_holds_the_cell() -> None:
    made = filled()
    # 0 and 3 share the cells of tasks 0 and 1, where each is the better one at one of them
    assert made.cells[0][(0, 3)] == 3 and made.cells[1][(0, 3)] == 0 and made.cells[2][(0, 0)] == 0
    assert made.insert(9, (0.2, 0.3, 3.9)) == []  # as good is not better
    made.forget([9])
    assert set(made.scores) == {0, 1, 2, 3, 9}
    assert made.insert(4, (0.45, 0.35, 3.95)) == [0, 1, 2] and made.cells[0][(0, 3)] == 4
    assert [made.best(t) for t in range(3)] == [1, 1, 4]


def test_chances_are_the_product_of_quality_and_coordinates() -> None:
    made = filled()
    who, got = made.chances(0)
    q = np.array([made.scores[w][0] for w in who])
    cells = np.array(list(made.cells[0]), float)
    want = 0.5 + 0.3 * (q - q.min()) / (q.max() - q.min())
    for axis in cells.T:
        want = want * (0.5 + 0.3 * (axis - axis.min()) / (axis.max() - axis.min()))
    np.testing.assert_allclose(got, want / want.sum())


def test_parents_are_drawn_by_their_chances_and_differ() -> None:
    made, rng = filled(), np.random.default_rng(0)
    who, chance = made.chances(0)
    pairs = [made.parents(0, rng) for _ in range(4000)]
    assert all(a != b for a, b in pairs)
    first = np.array([[a == w for w in who] for a, _ in pairs]).mean(0)
    np.testing.assert_allclose(first, chance, atol=0.03)


def test_parents_where_an_archive_holds_one() -> None:
    made, rng = Archives.empty(Grid((0.0, 0.0), (1.0, 1.0), 2)), np.random.default_rng(0)
    made.insert(0, (0.1, 0.2))
    assert made.parents(0, rng) == (0, 0)
    made.insert(1, (0.05, 0.3))  # not better at task 0, better at task 1
    assert made.cells[0] == {(0,): 0} and {made.parents(0, rng)[1] for _ in range(5)} == {1}


def test_the_best_all_round_has_the_highest_mean_share() -> None:
    made = filled()
    want = max(made.scores, key=lambda w: np.mean(np.array(made.scores[w]) / np.array([1.0, 2.0, 4.0])))
    assert made.all_round() == want == 1


@pytest.mark.parametrize("bins", [1, 3])
def test_equal_scores_make_a_grid_too(bins: int) -> None:
    made = Archives.empty(Grid.around([(2.0, 2.0)] * 3, bins))
    for who in range(3):
        made.insert(who, (2.0, 2.0))
    assert made.alive() == {0} and made.chances(0)[1].tolist() == [1.0]
