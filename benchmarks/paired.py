"""Two calls that take turns: the medians of both, and how many times faster the second one is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.statistics import bootstrap_interval, median, round_ratios
from benchmarks.tables import table

_SAMPLE_SECONDS = 0.3

Call = Callable[[], Any]


def measure_pair(before: Call, after: Call, rounds: int) -> dict[str, Any]:
    """Milliseconds a call, the ratio's median over the rounds and its 90 % interval, and all samples."""
    calls = (before, after)
    samples: list[list[float]] = [[], []]
    repeats = [max(1, round(_SAMPLE_SECONDS / _seconds(call, 1))) for call in calls]
    for _ in range(rounds):
        for call, taken, times in zip(calls, samples, repeats):
            taken.append(_seconds(call, times))
    ratios = round_ratios(*samples)
    return {
        "before_ms": median(samples[0]) * 1e3,
        "after_ms": median(samples[1]) * 1e3,
        "ratio": median(ratios),
        "interval": bootstrap_interval(ratios),
        "samples_ms": [[1e3 * seconds for seconds in taken] for taken in samples],
    }


def _seconds(call: Call, times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def pair_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line a pair."""
    heading = ("model", "call", "threads", "batch", "ms before", "ms after", "ratio", "90 % interval", "largest error")
    return table(
        heading,
        (
            (
                f"{row['model']}, {row['image']} x {row['image']}",
                f"`{row['call']}`",
                str(row["threads"]),
                str(row["batch"]),
                f"{row['before_ms']:.1f}",
                f"{row['after_ms']:.1f}",
                f"{row['ratio']:.2f}",
                "{:.2f} to {:.2f}".format(*row["interval"]),
                f"{row['error']:.1e}",
            )
            for row in rows
        ),
    )
