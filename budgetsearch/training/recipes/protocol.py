"""What a training of one's own tells budgetsearch: ``Recipe``, and ``Course``, which it is told in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from budgetsearch.core.records import Params, Schedule
from budgetsearch.core.schedule import rate_factor

if TYPE_CHECKING:
    from budgetsearch.core.records import WorkerSetup
    from budgetsearch.training.trainers import Send, Stopping, Trainer

REQUIRED = ("start", "train", "evaluate", "save", "load")
"""What every recipe has to say itself."""


class Course:
    """The way of one trial, as its recipe may ask for it while it trains."""

    def __init__(
        self,
        schedule: Callable[[], Schedule],
        stopping: Callable[[], bool],
        tell: Callable[[int, float | None], None],
    ) -> None:
        """``schedule()``: the one that holds now; ``stopping()``: whether to stop; ``tell(units, loss)``."""
        self._schedule, self._stopping, self._tell = schedule, stopping, tell

    def should_stop(self) -> bool:
        """Whether to return as soon as the trial can be saved: the time is up, or the run is to end.

        A recipe need not ask. It is called for a few seconds of training at a time; one that asks in between
        ends sooner.
        """
        return self._stopping()

    @property
    def schedule(self) -> Schedule:
        """The whole of what ``rate`` follows, as things stand."""
        return self._schedule()

    def rate(self, units: int) -> float:
        """What to multiply the learning rate with after so many units: 0 to 1.

        Linear warmup over 20 steps (or a third of the first segment), constant trunk, and in a full run a
        cooldown to zero at its end, wherever the time that is left moves it to (Hägele et al. 2024, arXiv
        2405.18392). With this schedule a trial that is paused says as much as one that was never paused. A
        recipe may have one of its own instead; see ``length``.
        """
        return rate_factor(self.schedule, units)

    def tell(self, units: int, loss: float | None = None) -> None:
        """A sign of life: so many units are trained, with this training loss of late. It may be left out."""
        self._tell(units, loss)


class Recipe:
    """A training of one's own: a class like this, and ``budgetsearch run --recipe my_module:MyRecipe``.

    budgetsearch decides which configuration trains for how long, pauses trials and goes on with them, keeps
    the deadline, and survives crashes. The recipe says what training is, in five methods. A *trial* is
    whatever ``start`` returns: the recipe's own object, which budgetsearch only hands back. How long a trial
    trained is counted in *units* of the recipe's choice: steps, samples, trees.

    The whole of it in a dozen lines; a mean that learns::

        class Mean(bs.Recipe):
            unit = "steps"
            space = {"dimensions": {"rate": {"kind": "float", "low": 0.001, "high": 1.0, "log": True}}}

            def start(self, params, seed):
                return {"value": 0.0, "rate": params["rate"]}

            def train(self, trial, units, until, course):
                for step in range(units, until):
                    trial["value"] += trial["rate"] * course.rate(step) * (3.0 - trial["value"])
                return until

            def evaluate(self, trial):
                return (3.0 - trial["value"]) ** 2

            def save(self, trial, folder):
                (folder / "mean.json").write_text(json.dumps(trial))

            def load(self, params, seed, folder):
                return json.loads((folder / "mean.json").read_text())

    What must hold, and what ``budgetsearch check my_module:MyRecipe`` looks for:

    - ``train`` to 30 and then to 80 equals ``train`` to 80, also with ``save`` and ``load`` in between: put
      into the checkpoint whatever training depends on, states of optimizers and random numbers included;
    - units never go backwards, and grow by at least one where there is more to do;
    - ``evaluate`` returns numbers, of which less is better, and changes nothing.

    One object of the class lives in each worker process and serves all of its trials, one at a time.
    Exceptions are the caller's: out of memory makes the trial infeasible, a ``FloatingPointError`` or a loss
    that is not finite makes it diverged, and anything else is tried once more.
    """

    unit: ClassVar[str] = "steps"
    """What training is counted in, as a plural."""
    metric: ClassVar[str] = "loss"
    """What ``evaluate`` returns; less is better: of an accuracy return one minus it, and name it error."""
    second_metric: ClassVar[str | None] = None
    """What ``second`` returns, an accuracy say: the report and ``compare`` show it beside ``metric``, of what
    is handed out and of the same configuration untrained. Nothing is chosen by it."""
    second_direction: ClassVar[str] = "max"
    """Whether more of it is better (``max``) or less (``min``)."""
    step: ClassVar[int] = 1
    """The fewest units that ``train`` can do at once."""
    piece: ClassVar[float] = 1.0
    """Seconds for which ``train`` is called at once, about: more for one that takes long to begin."""
    length: ClassVar[int | None] = None
    """The most units that make sense: where the recipe's own schedule ends, or the data do. None: a full run
    takes as many as the time allows."""
    own_schedule: ClassVar[bool] = False
    """Its learning rate follows a schedule of its own that ends at ``length`` (a cosine, say) in place of
    ``course.rate``. A trial that is paused then says little about its end: the policy looks later, and where
    the time holds few full runs it compares at a sixth of the way only."""
    whole: ClassVar[bool] = False
    """It cannot go on from where it was: ``train`` is called once for each segment and begins anew. Whoever
    is promoted then pays for its first units again."""
    space: ClassVar[Mapping[str, Any] | None] = None
    """The search space, unless ``--space`` names another one: as in a YAML file."""

    def setup(self, device: str) -> None:
        """Once in each worker, before the first trial: load data, and what all trials share.

        ``device``: ``cpu`` or ``cuda:N``.
        """

    def start(self, params: Params, seed: int) -> Any:
        """A fresh trial of this configuration; all that is random in it follows from ``seed``."""
        raise NotImplementedError

    def train(self, trial: Any, units: int, until: int, course: Course) -> int | None:
        """Train from ``units`` on, until there are ``until``; returns how many there are (None: ``until``).

        It may go beyond by less than ``step``, and return earlier if ``course.should_stop()``.
        """
        raise NotImplementedError

    def evaluate(self, trial: Any) -> float | Sequence[float]:
        """The trial's loss, or one for each validation example, always the same ones in the same order.

        With one per example, differences between trials get an interval.
        """
        raise NotImplementedError

    def second(self, trial: Any) -> float | Sequence[float]:
        """The trial's ``second_metric``, or one for each validation example, in the order of ``evaluate``.

        What it raises costs this number, and never the run.
        """
        raise NotImplementedError

    def save(self, trial: Any, folder: Path) -> None:
        """Write all that ``load`` needs into an empty folder: files, and no folders in it.

        safetensors and JSON are good formats: nothing else has to be unpickled.
        """
        raise NotImplementedError

    def load(self, params: Params, seed: int, folder: Path) -> Any:
        """The trial that ``save`` wrote, as it was."""
        raise NotImplementedError

    def export(self, trial: Any, folder: Path) -> None:
        """Write what is handed out in the end: the user finds the best trial's in ``RUN/adapter``.

        Without a method of its own: what ``save`` writes.
        """
        self.save(trial, folder)

    def memory(self, params: Params) -> int:
        """Bytes that training this configuration will take; 0: nobody knows. One that cannot fit is not
        tried."""
        return 0

    def trainer(self, setup: WorkerSetup, send: Send, stopping: Stopping) -> Trainer | None:
        """Who carries out a worker's jobs with this recipe, where it can do more than train one trial.

        None: trial after trial is trained with the methods above. One of your own may train several at once
        (a gang), and says in its calibration how many and what that gains; it may foresee what fits into
        memory, and measure what an answer takes. Adapters have such a one. See
        ``budgetsearch.training.trainers.Trainer``.
        """
        return None


def is_exported_apart(recipe: Recipe) -> bool:
    """Whether what it hands out is another thing than what it saves."""
    return type(recipe).export is not Recipe.export
