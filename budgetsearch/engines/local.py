"""One worker process on this machine, started when needed and started again when it dies."""

from __future__ import annotations

import json
import os
import queue
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from budgetsearch.core.codec import encode
from budgetsearch.core.errors import EngineError
from budgetsearch.core.policy.deadline import ENDING
from budgetsearch.core.records import Cancel, Job, WorkerSetup
from budgetsearch.core.reports import JobEnded, Report
from budgetsearch.core.results import crashed_results, stranded_results
from budgetsearch.engines.pipes import arrived, listen, start
from budgetsearch.engines.worker import EXIT_DEVICE

MAX_DEATHS = 5
"""A worker that died so often without finishing a job is not started again."""
PROVEN = 3
"""So many times as often where jobs have been finished before: some configurations kill it, and the search
has to get past them. Each is tried twice."""
MAX_LOSSES = 1
"""So many times in a row a new process may find the card gone again."""
CODE_SECONDS = 2.0
"""A process whose output has ended gets so long to exit by itself, with its code."""
ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Nearly every pass has a size of its own: torch's allocator then grows its blocks, where it would scatter
them. What the user has set stays."""
WORKER = "budgetsearch.engines.worker"


def allocator() -> Mapping[str, str]:
    """Variables for a process that does on a card what the worker does there."""
    return {} if {"PYTORCH_ALLOC_CONF", *ALLOCATOR} & set(os.environ) else ALLOCATOR


def most_deaths(*, proven: bool) -> int:
    """After how many deaths in a row a worker is given up. ``proven``: it has finished a job before."""
    return MAX_DEATHS * PROVEN if proven else MAX_DEATHS


class LocalEngine:
    """The engine behind one GPU: a child process that keeps the base model resident."""

    slots = 1

    def __init__(
        self,
        setup: WorkerSetup | None,
        log: Path,
        keep_open: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        worker: str = WORKER,
    ) -> None:
        """``keep_open`` are file descriptors that the worker inherits: the run's lock, so that a run
        counts as in use until its worker is gone as well. ``environment`` are further variables for
        the worker. Without ``setup``, call ``prepare`` before the first job. ``worker`` is the module
        that the process runs."""
        self._worker = worker
        self._setup, self._log, self._keep_open = setup, log, tuple(keep_open)
        self._environment = {"PYTHONUNBUFFERED": "1", **allocator(), **(environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self._reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        self._job: Job | None = None
        self._deaths = self._losses = 0
        self._proven = self._ended = False
        self._introduced = False

    def warm_up(self) -> None:
        """Start the process early: its imports take seconds that others can use."""
        self._ensure_process()

    def prepare(self, setup: WorkerSetup) -> None:
        """Say what the worker is to work on, before the first job."""
        self._setup = setup

    def submit(self, job: Job) -> None:
        """Start a job; see the port."""
        if self._job is not None:
            raise EngineError(f"job {job.job_id} was submitted while job {self._job.job_id} runs")
        self._ensure_process()
        self._job = job
        if not self._introduced:
            if self._setup is None:
                raise EngineError("the engine was never told what to work on")
            self._write(encode(self._setup))
            self._introduced = True
        self._write(encode(job))

    def poll(self, timeout: float) -> list[Report]:
        """Reports that have arrived; see the port."""
        return [report for said in arrived(self._reports, timeout) for report in self._digest(said)]

    def cancel(self, job_id: int) -> None:
        """Ask a job to checkpoint and stop."""
        if self._job is not None and self._job.job_id == job_id:
            self._write(encode(Cancel(job_id)))

    def kill(self, job_id: int) -> None:
        """End the process; the job's end is reported as a crash."""
        if self._process is not None and self._job is not None and self._job.job_id == job_id:
            self._ended = True
            self._process.kill()

    def end(self) -> None:
        """Kill the process, from any thread and without waiting for anything."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process; safe to call twice."""
        process, self._process = self._process, None
        self._job = None
        if process is None:
            return
        self._reports = queue.SimpleQueue()
        if process.stdin is not None:
            try:
                process.stdin.close()
            except OSError:
                pass
        try:
            process.wait(ENDING["worker"])
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # ------------------------------------------------------------------- the process

    def _ensure_process(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        if self._losses > MAX_LOSSES:
            raise EngineError(
                f"The card does not answer any more. The worker's last words: {self._last_words()}. Look at "
                "nvidia-smi; a reset or a reboot may bring it back. Everything so far is kept, and "
                "`budgetsearch resume RUN` goes on then."
            )
        if self._deaths >= most_deaths(proven=self._proven):
            raise EngineError(
                f"The worker process died {self._deaths} times without finishing a job. Its last words:\n"
                f"{self._last_words()}\nThe whole log is {self._log}."
            )
        self._introduced = self._ended = False
        self._process = start(
            self._worker, self._log, keep_open=self._keep_open, environment=self._environment
        )
        self._reports = listen(self._process, Report, "reports")

    def _write(self, message: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it just died: the reader reports that

    def _digest(self, report: Report | None) -> list[Report]:
        if report is None:
            return self._died()
        if isinstance(report, JobEnded):
            self._job, self._deaths, self._losses, self._proven = None, 0, 0, True
        return [report]

    def _died(self) -> list[Report]:
        job, self._job = self._job, None
        code = None
        if self._process is not None:
            code = self._process.poll()
            if code is None:  # its output has ended, so it is about to; or nobody understood a line of it
                try:
                    code = self._process.wait(CODE_SECONDS)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    code = self._process.wait()
        self._deaths += 1
        lost = code == EXIT_DEVICE
        self._losses = self._losses + 1 if lost else 0
        if job is None:
            return []
        if lost:  # the trial has done nothing wrong
            return [JobEnded(job.job_id, stranded_results(job, f"the card is lost: {self._last_words()}"))]
        why = "the worker was ended, for its time was over" if self._ended else "the worker process died"
        why += f": {words}" if (words := self._last_words()) and not self._ended else ""
        return [JobEnded(job.job_id, crashed_results(job, why))]

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            return ""
        return " / ".join(lines[-3:])[-500:]
