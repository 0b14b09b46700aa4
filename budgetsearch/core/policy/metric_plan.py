"""How many answers the metric grades, and how much of the time that may take."""

from __future__ import annotations

from budgetsearch.core.metric import MIN_PAIRS

FINALISTS_GRADED = 3
"""Of the best by their loss so many are told apart by the metric before one runs in full."""
GRADE_SHARE = 0.05
"""Answers in the middle of a full run take so much of its training's time at most, ..."""
FINALS_SHARE = 0.1
"""... and those of the finalists and of its end together so much of it, ..."""
MOST_FINALS_SHARE = 0.3
"""... or so much where fewer answers than ``LEAST_ANSWERS`` would say nothing."""
LEAST_ANSWERS, MOST_ANSWERS = 16, 256


def metric_answers(questions: int, full_seconds: float, answer_seconds: float) -> int:
    """Answers of each finalist and of each graded checkpoint of the full run: as many as a small share of its
    time takes; none where that says nothing, or nobody knows what an answer takes."""
    if answer_seconds <= 0:
        return 0
    least, most = min(LEAST_ANSWERS, questions), min(MOST_ANSWERS, questions)
    each = (FINALISTS_GRADED + 1) * answer_seconds
    count = max(least, min(most, int(FINALS_SHARE * full_seconds / each)))
    return count if count >= MIN_PAIRS and count * each <= MOST_FINALS_SHARE * full_seconds else 0
