"""Records survive the way through JSON."""

from __future__ import annotations

import json
import typing

import pytest

from budgetsearch.core.codec import decode, encode
from budgetsearch.core.decisions import Run
from budgetsearch.core.events import Decided, Event
from budgetsearch.core.history.fold import ON
from budgetsearch.core.history.outcomes import OUTCOMES
from budgetsearch.core.records import Job, Schedule, Score, Segment, SegmentResult, Status, TrainJob
from budgetsearch.core.reports import Beat, JobEnded, Report

SEGMENT = Segment(1, {"rank": 8, "quantization": "nf4", "flag": True}, 5, 0, 0, 100, Schedule(10, 100), 8, 4)
JOB = TrainJob(3, (SEGMENT, SEGMENT), 32, 60.5)


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        (Job, JOB),
        (Event, Decided(1.5, 1, Run(JOB, ("why",)))),
        (Report, Beat(1, None, "train", 10, 0.5, 100)),
        (
            Report,
            JobEnded(
                3,
                (
                    SegmentResult(1, 0, "ok", 100, 0.5, (0.4, 0.6), seconds={"train": 1.0}),
                    Score("ok", "nf4", samples=({"prompt": "é"},)),
                ),
            ),
        ),
    ],
)
def test_a_record_comes_back_equal(kind: object, record: object) -> None:
    """Encoding to JSON text and decoding gives an equal record, tuples and unions included."""
    text = json.dumps(encode(record), allow_nan=False)
    assert record == decode(kind, json.loads(text))


def test_a_wrong_record_is_refused() -> None:
    """Another record's name, an incomplete one and plain junk are errors, not half-filled records."""
    for value in ({"is": "Nonsense"}, {"is": "TrainJob", "job_id": 1}, {"is": "CalibrateJob"}):
        with pytest.raises(ValueError, match=r"no record named|incomplete"):
            decode(Job, value)
    with pytest.raises(ValueError, match="expected a Segment"):
        decode(Segment, "junk")


def test_the_fold_knows_every_event_and_every_status() -> None:
    """None is left out of its tables, and none stands there that cannot come."""
    assert set(typing.get_args(Event)) == set(ON)
    assert set(typing.get_args(Status)) - {"refused"} == set(OUTCOMES)  # which only a calibration is
