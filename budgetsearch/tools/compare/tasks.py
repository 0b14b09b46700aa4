"""What ``--tasks`` names: sources of rows as ``--data`` takes them, and standard tasks of lm-eval."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from budgetsearch.core.errors import DataError, UsageError
from budgetsearch.storage.files import sha256_of
from budgetsearch.tools.compare.gather import shown
from budgetsearch.tools.compare.pairing import TaskResult, unique
from budgetsearch.training.data.gym import GYM
from budgetsearch.training.data.hub import HUB
from budgetsearch.training.data.origins import Origin, check_spelling, origins_of
from budgetsearch.training.data.rows import EXTENSIONS
from budgetsearch.training.data.samples import check_rows, load_samples, prompt_key


@dataclass(frozen=True)
class Tasks:
    """What bases and adapters are asked, and how."""

    names: str | None = None
    """Names of lm-eval, data files or reasoning-gym:NAME, with commas; None: nothing is asked."""
    limit: int | None = None
    """So many examples of each task at most."""
    folder: Path | None = None
    """Local task definitions for lm-eval. They can run code."""
    chat_template: bool = False
    """Whether lm-eval wraps its prompts in the chat template."""
    gpu: str | None = None
    """Card to ask on; None: that of the first run."""
    trust_remote_code: bool = False
    """Whether code that came with a base may run, if it ran in the run."""
    model: str | None = None
    """The base of a run that was begun elsewhere: it may be fetched."""

    def check(self) -> None:
        """Insist on options that fit together.

        Raises:
            UsageError: one of them cannot be used, or nothing is asked.
        """
        if self.names is None and self != Tasks():
            raise UsageError(
                "--limit, --task-data, --chat-template, --trust-remote-code, --model and --gpu belong to "
                "--tasks; name tasks too."
            )
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be 1 or more; it is {self.limit}.")
        if self.folder is not None and not self.folder.is_dir():
            raise UsageError(
                f"--task-data {self.folder} is not a folder; it holds task definitions of lm-eval."
            )


CHALLENGE = "challenge"
"""In place of tasks: the open scenarios of the NeurIPS LLM Efficiency Challenge."""
BIG_BENCH = (
    *("analytic_entailment", "causal_judgment", "emoji_movie", "empirical_judgments", "known_unknowns"),
    *("logical_deduction", "strange_stories", "snarks", "dark_humor_detection"),
)
"""What its published configuration took of BIG-bench."""
SCENARIOS = {
    "MMLU": "mmlu",
    "TruthfulQA": "truthfulqa_mc1",
    "BIG-bench": ",".join(f"bigbench_{name}_multiple_choice" for name in BIG_BENCH),
    "GSM8K": "gsm8k",
    "BBQ": "bbq",
}
"""Tasks of lm-eval by scenario; its prompts and numbers of examples are not quite those of the challenge's
own harness, so scores are of the same kind, not the published ones."""
COMMAS = re.compile(r",(?![^\[]*\])")
"""Between tasks; not those inside the list of a parameter."""


@dataclass(frozen=True)
class Task:
    """One scenario."""

    name: str
    """As it is shown."""
    source: str
    """As it was given; several tasks of lm-eval that are one scenario, with commas."""

    @property
    def foreign(self) -> list[str]:
        """The tasks of lm-eval."""
        return [] if self.ours else self.source.split(",")

    @property
    def ours(self) -> bool:
        """Whether its rows are read and graded here; else lm-eval does both."""
        return is_source(self.source)


def is_source(text: str) -> bool:
    """Whether this names rows, as ``--data`` does."""
    return text.startswith((GYM, HUB)) or text.lower().endswith(EXTENSIONS)


def parse_tasks(text: str) -> list[Task]:
    """The tasks of a list with commas; their rows are looked at, nothing is fetched.

    Raises:
        UsageError: it is empty, or names rows that cannot be used.
    """
    sources = list(dict.fromkeys(part.strip() for part in COMMAS.split(text) if part.strip()))
    if not sources:
        raise UsageError(
            f"--tasks {text!r} names no task; give names of lm-eval, data files or {GYM}NAME, with commas."
        )
    for source in sources:
        if is_source(source) and not check_spelling(source):
            check_rows(Origin(source))
    pairs = [
        pair
        for source in sources
        for pair in (SCENARIOS.items() if source == CHALLENGE else [(_short(source), source)])
    ]
    names = unique([name for name, _ in pairs])
    return [Task(name, source) for name, (_, source) in zip(names, pairs, strict=True)]


def _short(source: str) -> str:
    if source.startswith(GYM):
        return source.removeprefix(GYM).partition("?")[0]
    return shown(Path(source).name if is_source(source) else source)


def overlap(task: Task, limit: int | None, data: str) -> tuple[int, int]:
    """(prompts of the task that stand in these data too, prompts); none where the data cannot be read."""
    prompts = [prompt_key(sample) for sample in load_samples(task.source)[:limit]]
    try:
        known = {prompt_key(sample) for origin in origins_of(data) for sample in load_samples(origin.source)}
    except (DataError, OSError):
        known = set()
    return sum(prompt in known for prompt in prompts), len(prompts)


def result_of(
    task: Task, metric: str, higher: bool, keys: Sequence[str], grades: Sequence[float]
) -> TaskResult:
    """Grades by example; examples that are alike are told apart by a number."""
    return TaskResult(task.name, metric, higher, tuple(unique(list(keys))), tuple(map(float, grades)))


def content_hash(task: Task, folder: Path | None) -> str:
    """What the task's rows are, as far as files of the user say: another content is another task."""
    if task.ours:
        path = Path(task.source).expanduser()
        return sha256_of(path) if path.is_file() else ""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
    parts = [f"{path.relative_to(folder or path)} {sha256_of(path)}" for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else ""


def key_of(value: object) -> str:
    """A short hash of anything that JSON can hold."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
