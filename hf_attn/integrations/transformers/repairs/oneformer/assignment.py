"""The cheapest assignment of targets to predictions, exact, without scipy."""

from __future__ import annotations

import numpy as np


def assign(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, as many as the shorter side, whose costs add up to the least; rows ascend.

    The function of scipy's `linear_sum_assignment`, which is taken where it is installed; else shortest augmenting
    paths with potentials (Kuhn 1955, Munkres 1957; O(n^2 m)), one path for each line of the shorter side.

    Args:
        costs: `[n, m]`, finite.
    """
    costs = np.asarray(costs, dtype=np.float64)
    if 0 in costs.shape:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        return shortest_paths(costs)
    return linear_sum_assignment(costs)


def shortest_paths(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`assign` without scipy."""
    if costs.shape[0] > costs.shape[1]:
        columns, rows = shortest_paths(costs.T)
        order = np.argsort(rows)
        return rows[order], columns[order]
    n, m = costs.shape
    row_potential, column_potential = np.zeros(n), np.zeros(m)
    owner = np.full(m, -1)  # row of each column
    for row in range(n):
        distance, before = np.full(m, np.inf), np.full(m, -1)
        done = np.zeros(m, dtype=bool)
        column, current, reached = -1, row, 0.0
        while True:
            reduced = reached + costs[current] - row_potential[current] - column_potential
            closer = ~done & (reduced < distance)
            distance[closer], before[closer] = reduced[closer], column
            column = int(np.where(done, np.inf, distance).argmin())
            reached = distance[column]
            done[column] = True
            if owner[column] < 0:
                break
            current = owner[column]
        inside = done & (owner >= 0)
        row_potential[row] += reached
        row_potential[owner[inside]] += reached - distance[inside]
        column_potential[inside] -= reached - distance[inside]
        while column >= 0:
            previous = before[column]
            owner[column] = row if previous < 0 else owner[previous]
            column = previous
    columns = np.flatnonzero(owner >= 0)
    rows = owner[columns]
    order = np.argsort(rows)
    return rows[order], columns[order]
