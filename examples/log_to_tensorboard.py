"""A logger, which is a watcher, and a callback of your own: both see every event of the ledger.

``pip install budgetsearch[tensorboard]``, then ``python examples/log_to_tensorboard.py`` and
``tensorboard --logdir runs``. ``logger("wandb")`` and ``logger("trackio")`` work alike, and so does
``budgetsearch run --log tensorboard`` on the command line.
"""

import budgetsearch as bs
from budgetsearch.core.events import Entry
from budgetsearch.core.history.history import History
from budgetsearch.views.loggers import logger


class Improvements:
    """Prints each new best. A callback that raises is left out from then on; the search goes on."""

    def __init__(self) -> None:
        self.best = float("inf")

    def on_segment_ended(self, entry: Entry, history: History) -> None:
        """Called after each segment of training, with the history that includes it."""
        best = history.incumbent
        if best is not None and best.best_loss is not None and best.best_loss < self.best:
            self.best = best.best_loss
            print(f"{entry.at:.0f} s: trial {best.trial_id} is the best so far, loss {self.best:.4f}")


result = bs.run(gpu="cpu", hours=0.2, watchers=[logger("tensorboard")], callbacks=[Improvements()])
print("logs", sorted((result.path / "tensorboard").iterdir()))
