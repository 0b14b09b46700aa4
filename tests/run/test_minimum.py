"""The least budget: what is guessed before anything is measured, and what a measurement may take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from budgetsearch.core.errors import BudgetError, ModelError
from budgetsearch.core.records import Calibration, Job
from budgetsearch.engines.simulator import VirtualClock
from budgetsearch.run import prepare
from budgetsearch.run.configuration import load_settings
from budgetsearch.run.foresight import FETCH_SECONDS, LEAST_FETCH_SECONDS, gather
from budgetsearch.run.jobs import Calibrator, NothingKept, check_usable
from tests.support.simulation import request


def test_a_model_that_is_still_to_be_fetched_takes_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the wheel of the default is here, its download and conversion are part of the least budget."""
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(tmp_path))
    settings = load_settings({"gpu": "cpu"}, cwd=tmp_path)
    before = gather(settings, tmp_path).setup
    name = settings.model.removeprefix("pypi:").replace("==", "-")
    (tmp_path / "models" / f"pypi-{name}").mkdir(parents=True)
    after = gather(settings, tmp_path, need_shape=False).setup
    assert before.usual - after.usual == pytest.approx(FETCH_SECONDS)
    assert before.least - after.least == pytest.approx(LEAST_FETCH_SECONDS)


def test_what_is_fetched_and_converted_is_timed_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later run does it again, so it says nothing of how long a later one takes to begin."""
    now = [100.0]

    def slow(*_: object, **__: object) -> SimpleNamespace:
        now[0] += 80.0
        return SimpleNamespace(path=tmp_path)

    def broken(*_: object) -> None:
        raise ModelError("the rest does not matter here")

    monkeypatch.setattr(prepare.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("budgetsearch.training.data.models.resolve_model", slow)
    monkeypatch.setattr(prepare, "examined", broken)
    watch = prepare.Watch()
    with pytest.raises(ModelError):
        prepare.prepare_inputs(load_settings({"gpu": "cpu"}, cwd=tmp_path), print, watch)
    assert watch.once == pytest.approx(80.0)


def test_the_first_measurement_may_take_most_of_the_time_and_the_next_half(tmp_path: Path) -> None:
    """Without the first there is nothing, and a later run would have to begin it again."""
    known: dict[str, Calibration] = {}
    sent: list[Job] = []
    calibrator = Calibrator(
        request(100.0),
        VirtualClock(20.0),
        sent.append,
        lambda found: None,
        ["fp32", "nf4"],
        lambda: known,
        NothingKept(),
    )
    calibrator.begin()
    known["fp32"] = Calibration("fp32", "ok", tokens_per_second=1e6)
    calibrator.begin()
    assert [64.0, 40.0] == pytest.approx([job.limit_seconds for job in sent])


def test_what_was_not_measured_in_time_is_called_a_guess() -> None:
    """The next number to try is no measured one, and leaves room."""
    with pytest.raises(BudgetError, match=r"--hours 300s or more \(a guess: measuring came to no end\)"):
        check_usable({"fp32": Calibration("fp32", "timeout")}, 100.0, 60.0)
    with pytest.raises(BudgetError, match="--hours 30s or more"):  # it took ten times the budget to begin
        check_usable({"fp32": Calibration("fp32", "timeout")}, 1.0, 10.0)
