"""A logger, and a callback of your own: both are watchers, which see every event of the ledger.

``pip install budgetsearch[tensorboard]``, then ``python examples/log_to_tensorboard.py`` and
``tensorboard --logdir runs``. ``logger("wandb")`` and ``logger("trackio")`` work alike, and so does
``budgetsearch run --log tensorboard`` on the command line.
"""

import budgetsearch as bs
from budgetsearch.core.events import Entry, SegmentEnded
from budgetsearch.core.history.history import History
from budgetsearch.views.loggers import logger


class Improvements:
    """Prints each new best. A watcher that raises is left out from then on; the search goes on."""

    def __init__(self) -> None:
        self.best = float("inf")

    def see(self, entry: Entry, history: History) -> None:
        """Called after every event, with the history that includes it."""
        best = history.incumbent
        if not isinstance(entry.event, SegmentEnded) or best is None or best.best_loss is None:
            return
        if best.best_loss < self.best:
            self.best = best.best_loss
            print(f"{entry.at:.0f} s: trial {best.trial_id} is the best so far, loss {self.best:.4f}")


result = bs.run(gpu="cpu", hours=0.2, watchers=[logger("tensorboard"), Improvements()])
print("logs", sorted((result.run / "tensorboard").iterdir()))
