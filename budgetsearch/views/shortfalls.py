"""What a run lost or never measured, and why: it stands before the run's results wherever they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from budgetsearch.core.history.history import History
from budgetsearch.core.history.trial import TrialState
from budgetsearch.core.policy.deadline import exit_seconds, seconds_left
from budgetsearch.core.records import Score
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.metric import ungraded
from budgetsearch.views.words import printable, words_of

IDLE_SHARE = 0.05
"""Of the budget: less that is left over, or was lost in crashes, is not worth a line."""
ENDINGS = {
    "crashed": "its worker crashed",
    "timeout": "it was stopped at its time limit",
    "cancelled": "it was stopped",
    "diverged": "it diverged",
    "out_of_memory": "memory ran out",
    "lost": "its checkpoint was lost",
    "unread": "its checkpoint cannot be read",
    "unwritten": "its checkpoint could not be written",
    "stranded": "its worker went away",
    "refused": "the base model cannot be had so",
}
"""How a segment ended that did not end well."""


@dataclass(frozen=True)
class Shortfall:
    """One thing that is missing of what a run is for."""

    kind: str
    """adapter, full run, loss, base, accuracy, answers, metric, comparison, checkpoints, crashes, time, study
    or report."""
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


def shortfalls(history: History, going: bool = False) -> tuple[Shortfall, ...]:
    """All of a run, the gravest first; none of one that goes, for it may still come to everything.

    ``going``: a process works on it. It counts only where the ledger does not say that the run is over.
    """
    if history.opened is None or (going and history.closed is None):
        return ()
    if history.incumbent is None:
        found = [Shortfall("adapter", "There is no adapter", _why(history))]
    else:
        found = [*_full_run(history), *_unmeasured(history), *_scores(history), *_metric(history)]
        found += _comparison(history)
    return (*found, *_losses_on_the_way(history), *_unused(history))


def shortfalls_of(folder: RunFolder, history: History, going: bool) -> tuple[Shortfall, ...]:
    """The same with what the run's folder lacks: the adapter first, then what else there is, the study and
    the reports last."""
    if going:
        return shortfalls(history, going)
    return (*_adapter(folder, history), *shortfalls(history), *_study(folder), *_reports(folder, history))


def _adapter(folder: RunFolder, history: History) -> Iterator[Shortfall]:
    best = history.incumbent
    if best is not None and not folder.holds_adapter(best.best_checkpoint):
        what = f"The adapter of trial {best.trial_id} is not in {folder.adapter}"
        yield Shortfall("adapter", what, _resume(folder, "writes it from the checkpoint, if that is there"))


def _study(folder: RunFolder) -> Iterator[Shortfall]:
    if folder.study_is_behind():
        what = "The Optuna study is not complete, the ledger is"
        yield Shortfall("study", what, _resume(folder, "brings it level"))


def _reports(folder: RunFolder, history: History) -> Iterator[Shortfall]:
    reports = (folder.report_html, folder.report, folder.report_json)
    unwritten = [path.name for path in reports if not path.is_file()]
    if history.closed is not None and history.closed.state == "finished" and unwritten:
        what = f"{', '.join(unwritten)} {'is' if len(unwritten) == 1 else 'are'} not there"
        yield Shortfall("report", what, f"`budgetsearch report {folder.command_word}` writes it")


def _resume(folder: RunFolder, does: str) -> str:
    return f"`budgetsearch resume {folder.command_word}` {does}"


def shortfall_lines(some: Iterable[Shortfall]) -> list[str]:
    """A line of a terminal for each; a reason that has been given is not given again."""
    lines, given = list[str](), ""
    for one in some:
        told = one
        if given and one.why.startswith(given):
            told = replace(one, why=f"the same{one.why.removeprefix(given)}")
        given = given if told is not one else one.why
        lines.append(f"MISSING  {printable(str(told))}")
    return lines


def adapter_shortfalls(history: History) -> tuple[Shortfall, ...]:
    """Those that say something of the adapter itself, also while the run still goes."""
    return tuple(one for one in shortfalls(history) if one.kind not in ("crashes", "time"))


def _why(history: History) -> str:
    if history.closed is not None:
        return history.closed.reason
    return history.finish.reason if history.finish is not None else "the run had not come to it"


# ---------------------------------------------------------------------------- the parts


def _full_run(history: History) -> Iterator[Shortfall]:
    """Nobody ran in full, or nobody to the end."""
    top = history.plan.top_rung if history.plan else 0
    sent = [state for state in history.trials.values() if state.goal == top]
    if not sent:
        yield Shortfall("full run", "No trial ran in full", _why(history))
    elif not any(map(history.ran_in_full, sent)):
        state = max(sent, key=lambda one: one.tokens)
        end = f" of {state.full_stop_tokens}" if state.full_stop_tokens else ""
        others = f" (and {len(sent) - 1} more)" if len(sent) > 1 else ""
        way = f"{state.tokens}{end} {words_of(history).unit}"
        what = f"The full run of trial {state.trial_id}{others} was cut short at {way}"
        yield Shortfall("full run", what, _why_cut(history, state))


def _why_cut(history: History, state: TrialState) -> str:
    """How the trial's last segment ended, if it did not end well; else why the search did."""
    last = next((r for _, r in reversed(history.results) if r.trial_id == state.trial_id), None)
    if last is None or last.status == "ok":
        return _why(history)
    return ENDINGS[last.status] + (f" ({last.detail})" if last.detail else "")


def _unmeasured(history: History) -> Iterator[Shortfall]:
    """Training of the best trial, or in a full run, after which no loss was measured."""
    top, words = history.plan.top_rung if history.plan else 0, words_of(history)
    out = "adapter" if words.of_adapters else "result"
    for state in history.trials.values():
        tokens = state.tokens - state.evaluated_tokens
        if tokens > 0 and (state is history.incumbent or state.goal == top):
            where = (
                f"are in the {out} because the training loss has fallen: no loss was measured after them"
                if state.judged
                else f"are in no {out}, for no loss was measured after them"
            )
            what = (
                f"The last {tokens} {words.unit} of trial {state.trial_id}{_seconds(history, state)} {where}"
            )
            yield Shortfall("loss", what, _why_cut(history, state))


def _seconds(history: History, state: TrialState) -> str:
    parts = [
        result.seconds.get("train", 0.0)
        for _, result in history.results
        if result.trial_id == state.trial_id and result.tokens > state.evaluated_tokens
    ]
    return f" ({sum(parts):.0f} s of training)" if sum(parts) else ""


def _scores(history: History) -> Iterator[Shortfall]:
    """Base and adapter were not compared, or in fewer answers than asked for."""
    score, asked = history.score, _asked(history)
    own = history.opened is not None and "recipe" in history.opened.facts
    if own and score is not None and score.adapter_loss is not None:
        return
    if score is None or score.base_loss is None or score.adapter_loss is None:
        words = words_of(history)
        what = f"The losses of {words.before} and {words.after} were never compared"
        yield Shortfall("base", what, _why_unscored(history, score))
    elif 0 < (measured := len(score.adapter_example_losses)) < (examples := _examples(history)):
        what = f"The losses of base and adapter rest on {measured} of {examples} examples"
        yield Shortfall("examples", what, _why_unscored(history, score))
    if not asked:
        return
    if score is None or score.adapter_accuracy is None:
        what = f"The task accuracy is not known: of {asked} answers none was graded"
        single = history.plan is not None and history.plan.single
        told = single and score is not None and score.status == "ok"
        why = "the budget had no time for answers" if told else _why_unscored(history, score)
        yield Shortfall("accuracy", what, why)
    elif score.task_examples < asked:
        what = f"The task accuracy rests on {score.task_examples} of {asked} answers"
        yield Shortfall("answers", what, _why_unscored(history, score))


def _metric(history: History) -> Iterator[Shortfall]:
    """The metric gave no number for some answers: each was left out."""
    failed, of = ungraded(history)
    if failed:
        said = [r.detail for _, r in history.results if r.metric and None in r.metric and r.detail]
        why = said[-1] if said else "the time for them was over"
        yield Shortfall("metric", f"{failed} of {of} answers have no number by the metric", why)


def _asked(history: History) -> int:
    """Answers that can be graded: as many as were asked for, no more than there are validation rows."""
    rows = history.facts.get("data", {}).get("valid", {}).get("rows")
    asked = history.plan.task_examples if history.plan else 0
    if history.plan is not None and history.plan.single and history.opened is not None:
        asked = int(history.opened.settings.get("task_examples") or 0)  # the plan has no time for them
    return asked if rows is None else min(asked, rows)


def _examples(history: History) -> int:
    return history.plan.eval_examples if history.plan else 0


def _why_unscored(history: History, score: Score | None) -> str:
    if score is not None and (score.detail or score.status != "ok"):
        return score.detail or f"the scoring ended with {score.status}"
    over = history.closed is not None and history.closed.state != "finished"
    return _why(history) if over or history.finish is None else "the time was over"


def _comparison(history: History) -> Iterator[Shortfall]:
    measured = sum(1 for state in history.trials.values() if state.losses or state.best_loss is not None)
    if measured == 1:
        tried = sum(1 for state in history.trials.values() if state.started)
        what = f"Only one configuration of {tried} tried has a loss, so nothing was compared"
        if tried == 1:
            what = "Only one configuration was tried, so nothing was compared"
        yield Shortfall("comparison", what, "no other got so far" if tried > 1 else _why(history))


def _losses_on_the_way(history: History) -> Iterator[Shortfall]:
    if history.lost:
        names = f"{len(history.lost)} checkpoints were" if len(history.lost) > 1 else "A checkpoint was"
        name, why = history.lost[-1]
        yield Shortfall("checkpoints", f"{names} lost, the last {name}", why)
    budget, gone = _budget(history), history.charged.get("crash", 0.0)
    if gone > IDLE_SHARE * budget:
        failed = [result for _, result in history.results if result.status in ENDINGS]
        why = f"{len(failed)} segments did not end well" if failed else "the process of the run was killed"
        yield Shortfall("crashes", f"{gone:.0f} of {budget:.0f} s came to nothing", why)


def _unused(history: History) -> Iterator[Shortfall]:
    if history.closed is None or history.closed.state != "finished" or history.plan is None:
        return
    budget = _budget(history)
    unused, leaving = budget - history.spent, exit_seconds(budget)
    if unused - leaving > IDLE_SHARE * budget:
        kept = unused - leaving - max(0.0, seconds_left(history.plan, history.finished_at))
        scores = f"; {kept:.0f} s of it had been kept for the scores" if kept > IDLE_SHARE * budget else ""
        what = f"{unused:.0f} of {budget:.0f} s were not used"
        yield Shortfall("time", what, f"{history.closed.reason}{scores}")


def _budget(history: History) -> float:
    return history.opened.budget_seconds if history.opened else 0.0
