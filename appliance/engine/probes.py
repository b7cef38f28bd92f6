"""Load-time probes: are a model's rows independent?

Rows of different requests share a run only when it is shown that a neighbour cannot change an answer: otherwise
batching would not only be wrong, it would leak one caller's data into another's reply.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from appliance.core.errors import InferenceFailed
from appliance.core.types import Array
from appliance.engine.gate import Runs

MAX_ROWS = 128
"""Rows in one run unless the bundle says otherwise; as many as one request may have inputs."""


def row_dependence(
    model: Runs, outputs: Sequence[str], rows: Sequence[Mapping[str, Array]], *, coarse: bool = False
) -> str:
    """Why rows must not share a run, or "" when the probes show them independent.

    Runs each row alone, then in batches of two and three with an outlier among them, and compares.

    Args:
        outputs: those with one entry a row, whose values may be compared (indices of equal scores may swap).
        rows: four rows of one shape, each with a batch axis of length 1; the last one is an outlier.
        coarse: it computes with half's precision, whatever the outputs' type is.
    """
    try:
        alone = [model.run(outputs, row) for row in rows]
        for members in ((0, 1), (0, 1, 3), (2, 0, 1)):
            together = model.run(outputs, join([rows[member] for member in members]))
            for name, result, singles in zip(outputs, together, zip(*alone, strict=True), strict=True):
                if not isinstance(result, np.ndarray) or result.ndim == 0 or len(result) != len(members):
                    return f"the output {name!r} does not have one entry for each row of a batch"
                for position, member in enumerate(members):
                    if not _close(result[position], singles[member][0], coarse):
                        return f"the output {name!r} of a row changes with its neighbours in the batch"
    except (InferenceFailed, ValueError, IndexError, TypeError) as error:
        detail = error.detail if isinstance(error, InferenceFailed) else str(error)
        return f"a batch of two or three rows failed: {detail.splitlines()[0][:200] if detail else error}"
    return ""


def join(rows: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Rows with a batch axis each → one batch."""
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def _close(one: Array, other: Array, coarse: bool) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    # Sums are ordered differently in larger batches; half precision keeps three digits.
    tolerance = 2e-2 if coarse or one.dtype == np.float16 else 1e-3
    return bool(np.allclose(one, other, rtol=tolerance, atol=tolerance / 10, equal_nan=True))
