"""What the benchmark of recipes makes of its pairs."""

from __future__ import annotations

from benchmarks.recipes.against import line, verdict


def test_the_verdict_counts_wins_and_deadlines() -> None:
    """Less is better; a run that came too late is told."""

    def pair(ours: float, theirs: float, spent: float) -> dict[str, object]:
        side = {"trials": 3, "spent_seconds": spent}
        return {
            "seed": 0,
            "seconds": 120.0,
            "budgetsearch": {**side, "loss": ours},
            "optuna": {**side, "loss": theirs},
        }

    pairs = [pair(0.5, 1.0, 110.0), pair(2.0, 1.0, 121.0), pair(0.8, 1.0, 119.0)]
    assert "better in 2 of 3 pairs" in verdict(pairs)
    assert "median 0.800; 1 after the deadline" in verdict(pairs)
    assert "budgetsearch 0.5000 (3 trials, 110 s), optuna 1.0000" in line(pairs[0])
