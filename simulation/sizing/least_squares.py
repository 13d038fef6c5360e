"""Least squares of relative errors in which no coefficient is negative. Pure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

STIFFNESS = 1e-3
"""How strongly a coefficient stays at 0, against what the rows say: it decides between columns that they cannot tell
apart."""


def relative(rows: npt.NDArray[np.float64], measured: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The coefficients for which ``rows @ coefficients`` is nearest to what was measured, as shares of that.

    The most negative coefficient becomes 0 until there is none.
    """
    scaled = rows / measured[:, None]
    sizes = np.linalg.norm(scaled, axis=0)
    columns = [column for column in range(rows.shape[1]) if sizes[column] > 0.0]
    found = np.zeros(rows.shape[1])
    while columns:
        part = scaled[:, columns] / sizes[columns]
        solved = np.linalg.solve(part.T @ part + STIFFNESS * np.eye(len(columns)), part.sum(axis=0))
        if solved.min() >= 0.0:
            found[columns] = solved / sizes[columns]
            break
        del columns[int(solved.argmin())]
    return found
