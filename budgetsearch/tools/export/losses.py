"""The validation rows of a run, and the loss of a model on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetsearch.core.errors import DataError, ModelError
from budgetsearch.core.history.history import History
from budgetsearch.core.ports import Say
from budgetsearch.run.permissions import Places, check_source
from budgetsearch.run.winner import settings_of
from budgetsearch.storage.files import cache_folder

if TYPE_CHECKING:
    from budgetsearch.training.data.store import TokenSet

MOST_ROWS = 256
"""Of the validation rows, the first ones: enough to tell a thousandth of a paired loss."""


@dataclass(frozen=True)
class Rows:
    """Validation rows, and the base that they were tokenized for."""

    data: TokenSet
    count: int
    base: Path

    def loss(self, model: Any, device: str, half: str) -> float:
        """Nats per trained token of a model in eval mode.

        Raises:
            ModelError: it is not finite.
        """
        from budgetsearch.training.evaluate import EVAL_BATCH, example_losses, mean_loss

        (found,) = example_losses(
            model, self.data, range(self.count), pad=0, device=device, half=half, batch=EVAL_BATCH
        )
        loss = mean_loss(found, [self.data.targets(row) for row in range(self.count)])
        if not math.isfinite(loss):
            raise ModelError("The loss on the validation rows is not finite.")
        return loss


def rows_of(run: Path, history: History, given: Places, say: Say) -> Rows:
    """Find base and validation rows of a run again, insisting that they are what they were.

    Raises:
        UsageError: one of them is not here, has changed, or would be fetched for a folder from elsewhere.
    """
    from budgetsearch.run.prepare import prepare_inputs
    from budgetsearch.training.data.models import resolve_again

    assert history.opened is not None
    settings, facts = settings_of(history), history.facts
    for role in ("model", "data", "valid"):
        if source := getattr(settings, role):
            check_source(run, role, source, getattr(given, role))
    if settings.trust_remote_code and not given.trust_remote_code:
        resolve_again(
            run,
            settings.model,
            cache_folder(),
            wanted=True,
            allowed=False,
            revision=settings.revision,
            say=say,
        )
    changed = {role: place for role in ("model", "data", "valid") if (place := getattr(given, role))}
    trusted = settings.trust_remote_code and given.trust_remote_code
    base, data = prepare_inputs(settings.model_copy(update={**changed, "trust_remote_code": trusted}), say)
    if base.sha256 != facts["model"]["sha256"]:
        raise ModelError(
            f"The base model {base.source} has changed since {run} was trained on it. Bring the old one "
            "back, or name its place with --model."
        )
    hashes = data.valid_hashes()
    if hashes["valid_tokens_sha256"] != facts["data"]["valid_tokens_sha256"]:
        raise DataError(
            f"The validation rows are not those of {run}, so no export can be compared on them. Bring the "
            "old data back, or name their place with --data and --valid."
        )
    return Rows(data.valid, min(len(data.valid), MOST_ROWS), base.path)
