"""Checkpoints that are written while the card goes on: one after the other, by a thread."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from budgetsearch.training.members import Member


class Writer:
    """Writes snapshots of members in the order in which they come; nobody leaves before all are written."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: dict[int, tuple[str, Future[None]]] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)

    def begin(self, member: Member) -> None:
        """Take a snapshot and begin to write it, behind those that are under way."""
        name, write = member.snapshot()
        self._under_way[member.segment.trial_id] = name, self._pool.submit(write)

    def saved(self, member: Member) -> str:
        """The name of the member's checkpoint, once it is on the disk; it is written now if none was begun.

        Raises:
            OSError: it could not be written.
        """
        if member.segment.trial_id not in self._under_way:
            return member.save()
        name, written = self._under_way.pop(member.segment.trial_id)
        written.result()
        return name

    def drop(self, member: Member) -> None:
        """Take back what was begun: the trial turned out to be worth nothing."""
        found = self._under_way.pop(member.segment.trial_id, None)
        if found is not None:
            found[1].exception()  # whatever became of it
            shutil.rmtree(member.shop.checkpoint_path / found[0], ignore_errors=True)
