"""Grades of answers by the metric: one that raises, hangs or gives no number costs its example alone."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import SettingsError
from budgetsearch.core.metric import Metric
from budgetsearch.machine import child
from budgetsearch.training.data.conversation import Sample
from budgetsearch.training.data.grading import METRICS

MODULE = "budgetsearch.training.metric_process"
EXAMPLE_SECONDS = 10.0
"""A metric may take so long for one answer."""
START_SECONDS = 60.0
"""Importing it may take so long."""
LOOK_SECONDS = 0.2
"""While a metric works it is looked so often whether there is still time."""
MAX_HANGS = 3
"""After so many in a row the rest of the answers is not graded."""


class Silent(Exception):
    """The metric's process did not answer, and is gone; says why."""


@dataclass
class Grader:
    """The metric of a run in a worker."""

    metric: str
    folder: str
    """Where a function of the user's may lie."""
    example_seconds: float = EXAMPLE_SECONDS
    failed: Counter[str] = field(default_factory=Counter)
    """Why answers have no grade, since the last ``told``."""
    _process: _Process | None = None

    def grade(
        self, answers: Sequence[tuple[Sample, str]], give_up: Callable[[], bool] = lambda: False
    ) -> list[float | None]:
        """The value of each answer; None where the metric failed, or the time was over."""
        found: list[float | None] = []
        hangs = 0
        for sample, answer in answers:
            if give_up() or hangs == MAX_HANGS:
                found.append(None)
                continue
            try:
                value = self._value(sample, answer, give_up)
                hangs = 0
            except Silent as error:
                value, hangs = None, hangs + 1
                self.failed[str(error)] += 1
            found.append(value)
        return found

    def told(self) -> str:
        """What went wrong since the last call, in a sentence; nothing if nothing did."""
        failed, self.failed = self.failed, Counter()
        if not failed:
            return ""
        why, _ = failed.most_common(1)[0]
        return f"{self.metric} gave no number for {failed.total()} answers ({why})"

    def close(self) -> None:
        """End the metric's process; safe to call twice."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _value(self, sample: Sample, answer: str, give_up: Callable[[], bool]) -> float | None:
        if self.metric in METRICS:
            return METRICS[self.metric](sample, answer)
        example = {"prompt": sample.asked[-1].content, "reference": sample.answer, "answer": answer}
        if self._process is None:
            self._process = _Process.start(self.metric, self.folder, give_up)
        try:
            said = self._process.ask(example, self.example_seconds, give_up)
        except Silent:
            self.close()
            raise
        if "value" in said:
            return float(said["value"])
        self.failed[str(said.get("error"))] += 1
        return None


@dataclass
class _Process:
    """A process that grades."""

    process: subprocess.Popen[str]
    said: queue.SimpleQueue[Mapping[str, Any] | None]

    @classmethod
    def start(cls, metric: str, folder: str, give_up: Callable[[], bool] = lambda: False) -> _Process:
        """Start it, and wait until it has the metric.

        Raises:
            Silent: it has not, or not in time.
        """
        process = subprocess.Popen(
            child.python(MODULE), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            encoding="utf-8", env=child.environment(), cwd=folder,
        )  # fmt: skip
        found = cls(process, queue.SimpleQueue())
        threading.Thread(target=found._listen, daemon=True, name="metric").start()
        try:
            said = found.ask({"metric": metric, "folder": folder}, START_SECONDS, give_up)
            if "error" in said:
                raise Silent(str(said["error"]))
        except Silent:
            found.end()
            raise
        return found

    def ask(self, message: object, seconds: float, give_up: Callable[[], bool]) -> Mapping[str, Any]:
        """What it answers.

        Raises:
            Silent: nothing in time, or it has ended.
        """
        assert self.process.stdin is not None
        until = time.monotonic() + seconds
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Silent("its process has ended") from error
        while time.monotonic() < until:
            try:
                said = self.said.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if give_up():
                    raise Silent("the time was over") from None
                continue
            if said is None:
                raise Silent("its process has ended")
            return said
        raise Silent(f"it took more than {seconds:.0f} s")

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass

    def _listen(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                self.said.put(read_json(line))
        except ValueError:
            pass  # half a line, or the pipe was closed
        self.said.put(None)


def check_metric(metric: Metric | None, folder: str) -> None:
    """Insist that a function can be had, in a process like that which will call it.

    Raises:
        SettingsError: it cannot be imported, or is no function.
    """
    if metric is None or not metric.is_function:
        return
    try:
        _Process.start(metric.name, folder).end()
    except Silent as error:
        raise SettingsError(
            f"--metric {metric.name} cannot be used: {error}. Its module must lie in {folder}, be installed, "
            "or be found through PYTHONPATH."
        ) from error
