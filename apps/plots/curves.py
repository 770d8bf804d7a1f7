"""Long and noisy columns of numbers, made fit to be seen."""

from __future__ import annotations

import numpy as np

# Points of a line beyond which a picture shows no more of them.
MOST_POINTS = 2000


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: the first, the last, and of each stretch between the lowest and the highest, so that no
    spike is lost. A stretch with nothing but NaN stays a gap.
    """
    if len(x) <= most:
        return x, y
    kept = [0, len(x) - 1]
    for stretch in np.array_split(np.arange(len(x)), (most - 2) // 2):
        values = y[stretch]
        if np.isnan(values).all():
            kept.append(stretch[0])
        else:
            kept += [stretch[np.nanargmin(values)], stretch[np.nanargmax(values)]]
    kept = np.unique(kept)
    return x[kept], y[kept]


def smooth(y: np.ndarray, width: int, in_logs: bool = False) -> np.ndarray:
    """Means of `width` neighbours, of those that are there at the end, and of fewer on both sides at the start, where
    curves are steep. `in_logs`: geometric ones. NaN stays NaN and counts for none.
    """
    half = width // 2
    if half == 0 or len(y) < 3:
        return y
    values = np.log(np.where(y > 0, y, np.nan)) if in_logs else y
    there = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    place = np.arange(len(y))
    before = np.minimum(half, place)
    low, high = place - before, np.minimum(place + before, len(y) - 1) + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (sums[high] - sums[low]) / (counts[high] - counts[low])
    means = np.where(there, means, np.nan)
    return np.exp(means) if in_logs else means
