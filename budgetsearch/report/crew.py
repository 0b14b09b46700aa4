"""What the live display says of several workers: how many are busy, and what their time has come to."""

from __future__ import annotations

from dataclasses import dataclass, field

from budgetsearch.accounts import Accounts
from budgetsearch.core.events import Entry, Resumed
from budgetsearch.core.history import History
from budgetsearch.report.tables import clock


@dataclass
class Crew:
    """The accounts of the entries that were seen; a process that resumes a run begins in its middle."""

    accounts: Accounts = field(default_factory=Accounts)
    resumed: bool = False

    def see(self, entry: Entry, history: History) -> None:
        """Take one more entry into account; ``history`` holds it already."""
        if isinstance(entry.event, Resumed):
            self.resumed = True
            self.accounts = Accounts(workers=history.workers, at=entry.at)
        self.accounts.apply(entry)

    def line(self, history: History, device: str) -> str:
        """Empty for one worker."""
        if max(self.accounts.most_workers, history.workers) == 1:
            return ""
        kind = "worker" if device == "cpu" else "GPU"
        since = " since the resume" if self.resumed else ""
        return (
            f"workers: {len(history.running)} of {history.workers} busy; "
            f"{clock(self.accounts.total)} of {kind} time{since}"
        )
