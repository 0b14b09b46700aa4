"""Ask bases and adapters: one resident base for all adapters of the same model and quantization."""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetsearch.core.errors import DataError, ModelError
from budgetsearch.core.plan import Plan
from budgetsearch.run.permissions import check_source
from budgetsearch.run.prepare import options_of
from budgetsearch.run.settings import Settings
from budgetsearch.run.winner import settings_of, targets_of_base
from budgetsearch.storage.ledger import read_history
from budgetsearch.storage.runfolder import RunFolder, told_by
from budgetsearch.tools.compare import kept
from budgetsearch.tools.compare.harness import ask_harness, check_harness
from budgetsearch.tools.compare.pairing import Run, TaskResult
from budgetsearch.tools.compare.tasks import Task, Tasks, content_hash, key_of, overlap, result_of

if TYPE_CHECKING:
    from budgetsearch.training.data.apart import EncoderApart
    from budgetsearch.training.data.models import BaseModel
    from budgetsearch.training.data.templates import Options

Answers = dict[str, dict[str, TaskResult]]
"""By task and entrant."""
Tick = Callable[[str, int, int], None]
"""(what is asked, answers so far, answers in all)."""
MAX_PROMPT = 4096
"""Tokens of a prompt; a longer one keeps its end."""


@dataclass(frozen=True)
class Subject:
    """A run with what is needed to load its base and its adapter."""

    run: Run
    settings: Settings
    plan: Plan | None
    adapter: Path
    checkpoint: str | None
    """What the best trial's adapter is made from."""

    @classmethod
    def of(cls, run: Run) -> Subject:
        """From its folder."""
        folder = RunFolder(Path(run.path))
        history = read_history(folder.ledger)
        settings = settings_of(history)
        best = history.incumbent
        return cls(run, settings, history.plan, folder.adapter, best.best_checkpoint if best else None)

    @property
    def silence(self) -> str:
        """Why its adapter cannot answer, if so."""
        if not kept.adapter_hash(self.adapter):
            return "there is no adapter on disk"
        if self.checkpoint is None or told_by(self.adapter).get("checkpoint") != self.checkpoint:
            return "the adapter on disk is not that of its best trial (`budgetsearch resume` writes that one)"
        return ""

    def base(self, cache: Path, allowed: bool, say: Callable[[str], None]) -> BaseModel:
        """The base model on this machine, not loaded; ``allowed``: whether code of its own may run.

        Raises:
            UsageError: it cannot be found, or it needs code that is not allowed.
        """
        from budgetsearch.training.data.models import resolve_again

        settings = self.settings
        return resolve_again(
            Path(self.run.path), settings.model, cache,
            wanted=settings.trust_remote_code, allowed=allowed, revision=settings.revision, say=say,
        )  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One task for one entrant."""

    task: Task
    entrant: str
    adapter: Path | None
    """None: the bare base."""
    run: Path
    """Where its answers are kept."""
    about: Mapping[str, Any]
    """All that they depend on."""
    options: Options
    """How the run's rows became tokens."""


@dataclass
class Asking:
    """Answers as they come in; what has come is kept when it is interrupted."""

    tasks: Sequence[Task]
    asked: Tasks
    """How they are asked."""
    cache: Path
    """Where converted base models are."""
    tick: Tick = lambda what, done, total: None
    say: Callable[[str], None] = lambda line: None
    answers: Answers = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ask(self, subjects: Sequence[Subject], bases: Mapping[tuple[str, str], str]) -> None:
        """Ask all of them everything that nobody has kept an answer to.

        Raises:
            UsageError: the card is not here, a base cannot be found or needs code of its own that is not
                allowed, or lm-eval is not installed.
            BudgetsearchError: a task cannot be run.
        """
        self._check()
        self.answers.update({task.name: {} for task in self.tasks})
        able = [one for one in subjects if not one.silence]
        self.notes += [f"{s.run.name}: {s.silence}, so it answered nothing" for s in subjects if s.silence]
        self._note_overlaps(able)
        if not able:
            return
        for one in able:
            check_source(Path(one.run.path), "model", one.settings.model, self.asked.model)
            if one.settings.trust_remote_code and not self.asked.trust_remote_code:
                one.base(self.cache, False, self.say)  # before the first answer, not after hours of them
        from budgetsearch.machine.detect import detect

        gpu = self.asked.gpu
        first = able[0].settings
        card = detect(gpu or first.gpu, None if gpu else first.device)
        # CUDA reads them when it is first used, which is below.
        os.environ.update(card.environment)
        for key, name in bases.items():
            same = [one for one in able if one.run.base_key == key]
            if same:
                self._ask_base(name, same, card)

    def _check(self) -> None:
        foreign = [name for task in self.tasks for name in task.foreign]
        if foreign:
            check_harness(foreign, self.asked.folder)

    def _note_overlaps(self, able: Sequence[Subject]) -> None:
        """An answer to what one has learnt is no test."""
        for task in self.tasks:
            for data in dict.fromkeys(one.settings.data for one in able) if task.ours else ():
                count, total = overlap(task, self.asked.limit, data)
                if count:
                    names = ", ".join(one.run.name for one in able if one.settings.data == data)
                    self.notes.append(
                        f"{count} of {total} prompts of {task.name} stand in the data of {names} too "
                        "(training or validation rows): answers to them are no test of what was not seen"
                    )

    def _ask_base(self, base_name: str, same: Sequence[Subject], card: Any) -> None:
        open_questions = []
        for question in self._all_questions(base_name, same, card):
            known = kept.load([one.adapter.parent for one in same], question.about)
            if known is None:
                open_questions.append(question)
            else:
                self._note(question, known)
        if not open_questions:
            return
        from budgetsearch.training.quiet import quiet

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            room = Room.opened(same[0], card, self.cache, self.asked.trust_remote_code, self.say)
            with closing(room):
                self._ask_in(room, open_questions)

    def _ask_in(self, room: Room, questions: Sequence[Question]) -> None:
        for adapter in dict.fromkeys(question.adapter for question in questions):
            mine = [question for question in questions if question.adapter == adapter]
            with room.wearing(adapter) as model:
                for question in mine:
                    self._note(question, self._put(question, room, model), keep=True)

    def _all_questions(self, base_name: str, same: Sequence[Subject], card: Any) -> Iterator[Question]:
        who: list[tuple[str, Path | None, Subject]] = [(base_name, None, same[0])]
        who += [(one.run.name, one.adapter, one) for one in same]
        for entrant, adapter, one in who:
            options = options_of(one.settings)
            for task in self.tasks:
                about = {
                    "task": task.source,
                    "content": content_hash(task, self.asked.folder),
                    "limit": self.asked.limit,
                    "chat_template": self.asked.chat_template,
                    "options": asdict(options),
                    "adapter": kept.adapter_hash(adapter) if adapter else None,
                    "base": same[0].run.model_sha256,
                    "quantization": same[0].run.quantization,
                    "card": card.name,
                    "versions": kept.versions("reasoning-gym" if task.ours else "lm-eval"),
                }
                yield Question(task, entrant, adapter, one.adapter.parent, about, options)

    def _put(self, question: Question, room: Room, model: Any) -> TaskResult:
        what = f"{question.entrant}: {question.task.name}"
        self.tick(what, 0, 0)

        def tick(done: int, total: int) -> None:
            self.tick(what, done, total)

        if question.task.ours:
            return room.own_answers(model, question, self.asked.limit, tick)
        encoder = room.encoder(question.options)  # begins when it is asked
        tokenizer = encoder.chatting() if self.asked.chat_template else encoder.tokenizer
        return ask_harness(
            model, tokenizer, question.task,
            limit=self.asked.limit, folder=self.asked.folder,
            chat=self.asked.chat_template, batch=room.batch,
        )  # fmt: skip

    def _note(self, question: Question, result: TaskResult, *, keep: bool = False) -> None:
        self.answers[question.task.name][question.entrant] = result
        if not keep:
            return
        try:
            kept.save(question.run, question.about, result)
        except OSError as error:
            self.notes.append(f"{question.entrant}: its answers cannot be kept in {question.run} ({error})")


@dataclass
class Room:
    """A resident base and what makes its tokens."""

    base: Any
    files: Path
    """Where the tokenizer lies."""
    trusted: bool
    """Whether code of the model's own may run."""
    device: str
    batch: int
    context: int
    """Tokens that the model takes in all."""
    encoders: dict[Options, EncoderApart] = field(default_factory=dict)

    @classmethod
    def opened(cls, one: Subject, card: Any, cache: Path, allowed: bool, say: Callable[[str], None]) -> Room:
        """Load the base of this run under its quantization; ``allowed``: whether code of its own may run.

        Raises:
            ModelError: it cannot be found, or it is no longer what the run trained on.
        """
        from budgetsearch.training.bases import load_base
        from budgetsearch.training.score import answer_batch

        settings, quantization = one.settings, one.run.quantization
        trust = settings.trust_remote_code and allowed
        found = one.base(cache, allowed, say)
        if found.sha256 != one.run.model_sha256:
            raise ModelError(
                f"The base model {settings.model} has changed since {one.run.path} was trained on it, so its "
                "answers would not be the run's. Bring the old one back, or compare without --tasks."
            )
        half = "fp16" if card.profile.dtype == "fp16" else "bf16"
        base = load_base(
            str(found.path),
            quantization,
            card.device,
            trust_remote_code=trust,
            half=half,
            targets=targets_of_base(told_by(one.adapter)),
        )
        micro_batch = one.plan.micro_batches.get(one.plan.cost_class(one.run.params), 1) if one.plan else 1
        context = int(getattr(base.config, "max_position_embeddings", 0) or 2 * MAX_PROMPT)
        return cls(base, found.path, trust, card.device, answer_batch(micro_batch), context)

    def encoder(self, options: Options) -> EncoderApart:
        """What makes tokens as these options say."""
        from budgetsearch.training.data.apart import EncoderApart

        if options not in self.encoders:
            made = EncoderApart(self.files, options, trust_remote_code=self.trusted)
            self.encoders[options] = made
        return self.encoders[options]

    def close(self) -> None:
        """End the processes that make tokens."""
        for encoder in self.encoders.values():
            encoder.close()

    @contextmanager
    def wearing(self, adapter: Path | None) -> Iterator[Any]:
        """Inside, the base with this adapter on it; afterwards it is bare again."""
        if adapter is None:
            yield self.base
            return
        from budgetsearch.training.adapters import worn

        model = worn(self.base, adapter)
        try:
            yield model
        finally:
            model.unload()

    def own_answers(
        self, model: Any, question: Question, limit: int | None, tick: Callable[[int, int], None]
    ) -> TaskResult:
        """Greedy answers to rows, graded as the search grades them.

        Raises:
            DataError: the rows cannot be read.
        """
        from budgetsearch.training.data.encoder import questions
        from budgetsearch.training.data.grading import answer_is_right
        from budgetsearch.training.data.samples import load_samples
        from budgetsearch.training.evaluate import generate_answers
        from budgetsearch.training.score import room_for

        task, encoder = question.task, self.encoder(question.options)
        asked = list(itertools.islice(questions(encoder, load_samples(task.source)), limit))
        if not asked:
            raise DataError(f"{task.source} holds no row that can be asked with this model's chat template")
        examples, prompts = [one for one, _ in asked], [ids for _, ids in asked]
        new = room_for([len(encoder.ids(e.answer)) for e in examples])
        grades: list[float] = []
        for start in range(0, len(examples), self.batch):
            some = examples[start : start + self.batch]
            texts = generate_answers(
                model,
                encoder.reader,
                prompts[start : start + self.batch],
                device=self.device,
                max_new_tokens=new,
                max_prompt_tokens=max(1, min(MAX_PROMPT, self.context - new)),
            )
            grades += [answer_is_right(e, text) for e, text in zip(some, texts or [], strict=True)]
            tick(len(grades), len(examples))
        keys = [
            key_of([[{"role": t.role, "content": t.content} for t in example.asked], example.answer])
            for example in examples
        ]
        return result_of(task, "graded as in the search", True, keys, grades)
