"""An encoder in a process of its own, for questions beside a run: what the model's files do is bounded there
as it is in the preparation, and a template without end ends with that process."""

from __future__ import annotations

import copy
import dataclasses
import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import DataError
from budgetsearch.machine import child
from budgetsearch.training.data import supervise
from budgetsearch.training.data.conversation import Sample, Skip, to_json
from budgetsearch.training.data.encoding import MODULE
from budgetsearch.training.data.reader import Reader
from budgetsearch.training.data.templates import Options
from budgetsearch.training.data.tokenizer import load_tokenizer

START_SECONDS = 120.0
"""Of imports, on a busy machine: nothing of a stranger's runs yet but the loading of a tokenizer."""
ADVICE = "leave it out, or choose another model or template"
Lines = queue.SimpleQueue[bytes | None]


class EncoderApart:
    """Makes tokens of samples and of texts as ``Encoder`` does, for one question at a time."""

    def __init__(
        self, model_path: Path, options: Options | None = None, *, trust_remote_code: bool = False
    ) -> None:
        """Its process begins with the first question, or with ``begin``."""
        self._task = {
            "model_path": str(model_path.absolute()),  # its process stands elsewhere
            "options": dataclasses.asdict(options or Options()),
            "trust_remote_code": trust_remote_code,
        }
        self._lock = threading.Lock()
        self._facts: Mapping[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lines: Lines = queue.SimpleQueue()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # it goes with this object

    def begin(self) -> None:
        """Start the process: its imports take seconds, during which something else may be done."""
        self._lines, self._facts = queue.SimpleQueue(), {}
        self._process = process = subprocess.Popen(
            child.python(MODULE), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env=child.environment({"TOKENIZERS_PARALLELISM": "false"}), cwd=child.NEUTRAL,
            start_new_session=True,  # Ctrl-C is its owner's, who may want answers until all are written
        )  # fmt: skip
        threading.Thread(target=supervise.listen, args=(process, self._lines), daemon=True).start()
        self._say(self._task)

    def close(self) -> None:
        """End the process; nothing begins it again."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]

    @cached_property
    def tokenizer(self) -> Any:
        """Here, for the text of tokens."""
        return load_tokenizer(
            Path(str(self._task["model_path"])), trust_remote_code=bool(self._task["trust_remote_code"])
        )

    @cached_property
    def reader(self) -> Reader:
        """What makes text of answers.

        Raises:
            DataError: the chat template cannot be used.
        """
        with self._lock:
            self._open()
            facts = self._facts
        return Reader.of(self.tokenizer, facts)

    def prompt(self, sample: Sample) -> list[int]:
        """The ids that the last answer of a sample follows.

        Raises:
            Skip: the sample cannot be used; DataError: it takes more time or memory than any should.
        """
        return list(self._ask(do="prompt", sample=to_json(sample)))

    def ids(self, text: str) -> list[int]:
        """A text as it is, with what the tokenizer itself puts in front; raises DataError as ``prompt``."""
        return list(self._ask(do="ids", text=text))

    def render(self, chat: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
        """The chat as a text, as ``Template.render``; raises DataError as ``prompt``."""
        return str(self._ask(do="render", chat=list(chat), prompt=prompt))

    def chatting(self) -> Any:
        """A tokenizer whose own ``apply_chat_template`` asks here, as training asked."""
        from jinja2.exceptions import TemplateError

        def apply_chat_template(chat: Sequence[Mapping[str, Any]], *, tokenize: bool, **how: Any) -> str:
            assert not tokenize
            try:
                return str(self._ask(do="chat", chat=list(chat), how=how))
            except Skip as skip:
                raise TemplateError(skip.reason) from None

        with self._lock:
            self._open()
            template = self._facts["chat_template"]
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.apply_chat_template = apply_chat_template
        return tokenizer

    # ------------------------------------------------------------------------ the process

    def _open(self) -> None:
        """Wait until it is ready, once.

        Raises:
            DataError: it was closed, or does not get ready.
        """
        if self._closed:
            raise DataError("the program is ending, so nothing is asked any more; start it again")
        if self._process is None or self._process.poll() is not None:
            self.begin()
        if not self._facts:
            self._heard(START_SECONDS, "loading the tokenizer")
            self._facts = self._heard(
                supervise.ROW_SECONDS, "a question and an answer, the first that the chat template is given"
            )

    def _ask(self, **request: Any) -> Any:
        what = str(request["sample"]["place"] or "a question") if "sample" in request else "a text"
        with self._lock:
            self._open()
            self._say(request)
            return self._heard(supervise.ROW_SECONDS, what)

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # that it died is heard
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _heard(self, seconds: float, what: str) -> Any:
        """Its next answer; a process that has none in time, or takes too much memory, is ended."""
        assert self._process is not None
        until, most = time.monotonic() + seconds, supervise.most_bytes()
        while True:
            try:
                line = self._lines.get(timeout=supervise.LOOK_SECONDS)
                break
            except queue.Empty:
                held = supervise.held_bytes(self._process.pid)
                if held > most:
                    raise self._ended(what, f"it takes more than {most / 2**30:.1f} GiB of memory") from None
                if time.monotonic() > until:
                    raise self._ended(what, f"it takes more than {seconds:g} s to make its tokens") from None
        if line is None:
            raise self._ended(what, f"the process that makes its tokens died: {self._last_words()}")
        message: Mapping[str, Any] = read_json(line.decode("utf-8", "replace"))
        if "skip" in message:
            raise Skip(message["skip"], message["place"])
        if "error" in message:
            raise DataError(f"{what}: {message['error']}")
        return message["done"]

    def _last_words(self) -> str:
        assert self._process is not None
        self._log.seek(0)
        words = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return words[-1][:300] if words else f"exit code {self._process.wait()}"

    def _ended(self, what: str, why: str) -> DataError:
        self._end()
        return DataError(f"{what}: {why}; {ADVICE}")
