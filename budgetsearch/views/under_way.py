"""What a going run does now, and when it will be over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from budgetsearch.core.history.history import History
from budgetsearch.storage.files import local_time
from budgetsearch.views.words import phase_of, rung_names, short_duration


def under_way(history: History, now: float) -> dict[str, Any]:
    """Plain JSON values about a run on which a process works; ``now``: seconds since the epoch."""
    spent, beat = history.spent + max(0.0, now - history.wall), history.last_beat
    ends = history.opened.budget_seconds - spent if history.opened else None
    return {
        "activity": beat.activity
        if beat is not None and beat.job_id in history.running
        else phase_of(history),
        "jobs": [
            {
                "trials": [segment.trial_id for segment in segments],
                "towards": rung_names(history)[segments[0].rung],
                "since_seconds": spent - history.running_since[job_id],
                "tokens_per_second": _rate(history, job_id),
            }
            for job_id, segments in history.running.items()
        ],
        "heartbeat_seconds_ago": None if beat is None else spent - history.last_beat_at,
        "ends": None if ends is None else local_time(now + ends),
    }


def _rate(history: History, job_id: int) -> float | None:
    """Tokens per second of the trial that the last heartbeat is of, since its job began; else unknown."""
    beat = history.last_beat
    if beat is None or beat.job_id != job_id:
        return None
    took = history.last_beat_at - history.running_since[job_id]
    start = [s.start_tokens for s in history.running[job_id] if s.trial_id == beat.trial_id]
    return (beat.tokens - start[0]) / took if start and took > 0 and beat.tokens > start[0] else None


def under_way_lines(found: Mapping[str, Any]) -> list[str]:
    """The same for people."""
    ago = found["heartbeat_seconds_ago"]
    beat = "" if ago is None else f"; last heartbeat {short_duration(ago)} ago"
    lines = [f"now     {'; '.join(map(_job_text, found['jobs'])) or found['activity']}{beat}"]
    return lines if found["ends"] is None else [*lines, f"ends    {found['ends']} at the latest"]


def _job_text(job: Mapping[str, Any]) -> str:
    several = len(job["trials"]) > 1
    who = (
        f"trials {', '.join(map(str, job['trials']))} train"
        if several
        else f"trial {job['trials'][0]} trains"
    )
    text = f"{who} towards {job['towards']} since {short_duration(job['since_seconds'])}"
    rate = job["tokens_per_second"]
    return text if rate is None else f"{text}, {rate:.0f} tokens/s{' each' if several else ''}"
