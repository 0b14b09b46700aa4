"""What a resume of a finished run does: what is missing, and nothing that is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from budgetsearch.run import conclusion, export, session
from budgetsearch.run.session import Caller
from budgetsearch.run.settings import Changes
from budgetsearch.storage.ledger import read_history
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.study import mirror
from tests.support.comparable import score, write_run
from tests.support.factories import FACTS


def test_a_whole_run_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its study is opened, and its reports are written, only where something of them may be missing: with
    thousands of trials both take long."""
    folder = RunFolder(write_run(tmp_path / "run", score(), facts={**FACTS, "study": "run"}))
    history, did = read_history(folder.ledger), list[str]()
    monkeypatch.setattr(export, "mend", lambda *_: False)

    def noted(place: Any, name: str, what: str) -> None:
        real = getattr(place, name)

        def call(*arguments: Any) -> Any:
            did.append(what)
            return real(*arguments)

        monkeypatch.setattr(place, name, call)

    noted(mirror, "mirror_of", "study")
    noted(conclusion, "write_in_time", "reports")

    def again() -> list[str]:
        did.clear()
        changed = conclusion.make_up(folder, history, Changes(), did.append)
        conclusion.conclude(folder, did.append, history=history, changed=changed)
        return [*did]

    both = ["study", "reports"]
    assert both == again()
    assert [] == again()
    folder.report.unlink()
    assert ["reports"] == again()
    folder.study.unlink()
    assert both == again() and folder.study.is_file()
    os.utime(folder.study)
    assert both == again()
    folder.note_study(level=False, events=history.seq)
    assert both == again()
    assert [] == again()


def test_more_hours_for_a_run_that_is_over_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gives them expects a search that goes on."""
    folder, said = RunFolder(write_run(tmp_path / "run", score())), list[str]()
    monkeypatch.setattr(session, "make_up", lambda *_: False)
    monkeypatch.setattr(session, "conclude", lambda *_, **__: None)
    session.resume(folder, Changes(), Caller(say=said.append))
    assert not any("no more time" in line for line in said)
    session.resume(folder, Changes(hours=3.0), Caller(say=said.append))
    assert any("takes no more time; `budgetsearch run` begins another" in line for line in said)
