"""Puts the best adapter where the user finds it, and removes the checkpoints that nothing needs.

The exported folder is always whole: a new one is built and synced beside it, then the two change
places, on Linux in one step. Elsewhere it takes two renames: a crash between them leaves the old one under
another name, and the next process puts it back.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from budgetsearch.core.bases import DIMENSION, facts_for
from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import (
    CheckpointError,
    DiskError,
    UnreadableError,
    UsageError,
)
from budgetsearch.core.history.history import History
from budgetsearch.core.history.retention import needed_checkpoints
from budgetsearch.core.history.trial import TrialState
from budgetsearch.storage.checkpoint_store import ONCE, CheckpointStore
from budgetsearch.storage.files import exchange, remedy, sha256_of, sync
from budgetsearch.storage.ownership import TORN, checkpoint_in, is_known, remove_checkpoints
from budgetsearch.storage.runfolder import MANIFEST_FILE
from budgetsearch.storage.shared import folder_of, open_store, place_name, url_of
from budgetsearch.training import sums
from budgetsearch.training.sums import ADAPTER_FILES
from budgetsearch.views.card import CARD_FILE, adapter_card, adapter_manifest

LOGGER = logging.getLogger("budgetsearch.storage.shared")
COPIED = (*sums.ADAPTER_FILES, sums.META_FILE)
"""Of a checkpoint: what an adapter is made from, and its sums."""
PAUSE_SECONDS = 60.0
"""So long a store that did not answer is not swept: the driver has other things to do than wait for it."""
TEMPLATE_FILE, GENERATION_FILE = "chat_template.jinja", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
"""Patterns of what ``AutoTokenizer.from_pretrained`` reads."""
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Patterns of the terms that come with a base model, and stay with what is made of it."""


@dataclass
class AdapterExporter:
    """Keeps ``run_folder/adapter`` at the best adapter so far; implements the driver's ``Exporter``."""

    run_folder: Path
    checkpoint_path: Path
    model_facts: Mapping[str, Any]
    data_facts: Mapping[str, Any]
    tokenizer_files_from: Path
    keep_checkpoints: bool = False
    owner: str = ""
    """The run, as the sign in ``checkpoint_path`` says: without it nothing is removed there."""
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    """Of several models, by label, in the place of ``tokenizer_files_from``; the facts are in the history."""

    def __post_init__(self) -> None:
        """Finish what a crash interrupted."""
        if self._old.exists() and not self.target.exists():
            os.replace(self._old, self.target)
        shutil.rmtree(self._old, ignore_errors=True)
        shutil.rmtree(self._new, ignore_errors=True)

    @property
    def target(self) -> Path:
        """Where the adapter stands."""
        return self.run_folder / "adapter"

    @property
    def fresh(self) -> Path:
        """Where a new one is built."""
        return self._new

    @property
    def _new(self) -> Path:
        return self.run_folder / ".adapter.new.tmp"

    @property
    def needed(self) -> tuple[str, ...]:
        """What an exported folder has in any case."""
        return ADAPTER_FILES

    def names(self, known: Mapping[str, str], source: Path) -> dict[str, str]:
        """The files of a source that go into the exported folder, and their names there."""
        return {name: name for name in ADAPTER_FILES}

    @property
    def _old(self) -> Path:
        return self.run_folder / ".adapter.old.tmp"

    def export(self, history: History, state: TrialState, *, final: bool) -> str:
        """Put the trial's best checkpoint on disk as a PEFT adapter; returns its path.

        Raises:
            CheckpointError: what it would be made from is missing or damaged; the adapter stays as it is.
            UnreadableError: that cannot be read now.
            DiskError: the folder cannot be written; the adapter stays as it is.
        """
        source, known = self._source(state)
        try:
            names = self.names(known, source)
            self._build(history, state, source, names)
            copied = sums.write_sums(self._new)
            if wrong := [name for name, new in names.items() if copied[new] != known[name]]:
                shutil.rmtree(self._new, ignore_errors=True)
                if sha256_of(source / wrong[0]) == known[wrong[0]]:
                    raise OSError(errno.EIO, "the copy is not what was copied", str(source / wrong[0]))
                raise CheckpointError(f"The checkpoint {source} is damaged: {wrong[0]} has changed.")
            for path in (*self._new.iterdir(), self._new):
                sync(path)
            self._swap()
        except OSError as error:
            shutil.rmtree(self._new, ignore_errors=True)
            raise DiskError(
                f"The adapter of trial {state.trial_id} cannot be written to {self.target} ({error}); "
                f"{remedy(error)}, then resume the run. Its checkpoint is {state.best_checkpoint}."
            ) from error
        return str(self.target)

    def damage(self, state: TrialState) -> str:
        """What is wrong with that from which the trial's adapter would be made; nothing if it is whole.

        Raises:
            UnreadableError: it cannot be read now.
        """
        try:
            source, _ = self._source(state)
            if source == self.target:
                sums.check_sums(source, self.needed)
            else:
                sums.check(source, self.names(sums.read_meta(source)["sha256"], source))
        except CheckpointError as error:
            return str(error)
        return ""

    def _source(self, state: TrialState) -> tuple[Path, Mapping[str, str]]:
        """(the folder that the adapter is made from, the sums of its files)."""
        if state.exported is not None and state.exported.name == state.best_checkpoint:
            source, known = self.target, sums.read_sums(self.target, self.needed)
            if self._made_from() != state.best_checkpoint:
                raise CheckpointError(f"The adapter in {source} was made from another checkpoint.")
        else:
            source = checkpoint_in(self.checkpoint_path, state.best_checkpoint)
            known = sums.read_meta(source)["sha256"]
        for name in self.names(known, source):
            if name not in known:
                raise CheckpointError(f"{name} is missing in {source}.")
            sums.patiently((source / name).stat, f"{name} in {source}")
        return source, known

    def stands(self, checkpoint: str) -> bool:
        """Whether the exported adapter is whole and was made from this checkpoint.

        Raises:
            UnreadableError: it cannot be read now.
        """
        try:
            sums.check_sums(self.target, self.needed)
            return self._made_from() == checkpoint
        except CheckpointError:
            return False

    def _made_from(self) -> str | None:
        """The checkpoint that the adapter says it was made from: after a lost end of the ledger it may be one
        that the history does not know."""
        content = sums.patiently((self.target / MANIFEST_FILE).read_bytes, f"The adapter in {self.target}")
        try:
            manifest = read_json(content)
        except ValueError:
            return None
        return manifest.get("checkpoint") if isinstance(manifest, dict) else None

    def missing(self, names: Iterable[str]) -> dict[str, str]:
        """Which of these checkpoints are obviously not whole, and why; sums are not looked at. One that
        cannot be read now is not among them."""
        found = {}
        for name in names:
            try:
                sums.check_sizes(self.checkpoint_path / name)
            except CheckpointError as error:
                found[name] = str(error)
            except UnreadableError:
                pass  # whoever needs it tries again
        return found

    def sweep(self, history: History) -> None:
        """Remove the checkpoints that nothing needs, and what crashed writers left behind."""
        spare = is_spare(history)

        def useless(name: str) -> bool:
            torn = not history.running and is_known(name, history.trials, TORN)
            return torn or (not self.keep_checkpoints and spare(name))

        remove_checkpoints(self.checkpoint_path, self.owner, useless)

    def with_tokenizer(self, folder: Path) -> Self:
        """The same, with the tokenizer's files from another folder."""
        return replace(self, tokenizer_files_from=folder)

    # ------------------------------------------------------------------------ the folder

    def _build(self, history: History, state: TrialState, source: Path, names: Mapping[str, str]) -> None:
        shutil.rmtree(self._new, ignore_errors=True)
        self._new.mkdir()  # not its parents: whoever removed the run's folder does not want another one
        for name, new in names.items():
            shutil.copyfile(source / name, self._new / new)
        self.describe(history, state, names)

    def describe(self, history: History, state: TrialState, names: Mapping[str, str]) -> None:
        """Write what goes with the adapter: tokenizer, template, ends of answers, manifest and card."""
        own = self._of(history, state)
        for path in own._tokenizer_files():
            shutil.copyfile(path, self._new / path.name)
        own._write_generation()
        quantization = str(state.trial.params["quantization"])
        about = (history, state, own.model_facts, own.data_facts, quantization)
        manifest = json.dumps(adapter_manifest(*about), indent=2, default=str)
        (self._new / MANIFEST_FILE).write_text(manifest + "\n", encoding="utf-8")
        (self._new / CARD_FILE).write_text(adapter_card(*about), encoding="utf-8")

    def _of(self, history: History, state: TrialState) -> Self:
        """The same for the model of a trial, where there are several."""
        facts = history.opened.facts if history.opened else {}
        if "models" not in facts:
            return self
        found, label = facts_for(facts, state.trial.params), str(state.trial.params[DIMENSION])
        own = copy(self)  # no new one: what crashed was cleared up once
        own.model_facts, own.data_facts = found["model"], found["data"]
        own.tokenizer_files_from = self.tokenizers.get(label, self.tokenizer_files_from)
        return own

    def _write_generation(self) -> None:
        """Where an answer ends, and the chat template if rows were rendered with another one."""
        if template := self.data_facts.get("chat_template"):
            (self._new / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        config = _object(self.tokenizer_files_from / GENERATION_FILE)
        config.pop("_from_model_config", None)  # generation would take the base's ends again
        known = config.get("eos_token_id")
        known = known if isinstance(known, list) else [known]
        stops = self.data_facts.get("stops") or []
        ends = [end for end in dict.fromkeys([*stops, *known]) if end is not None]
        if ends:
            text = json.dumps({**config, "eos_token_id": ends}, indent=2)
            (self._new / GENERATION_FILE).write_text(text + "\n", encoding="utf-8")

    def _tokenizer_files(self) -> set[Path]:
        patterns = (*TOKENIZER_FILES, *LICENCE_FILES)
        found = {path for pattern in patterns for path in self.tokenizer_files_from.glob(pattern)}
        return {path for path in found if path.is_file()}

    def _swap(self) -> None:
        shutil.rmtree(self._old, ignore_errors=True)
        if not (self.target.exists() and exchange(self._new, self.target)):
            if self.target.exists():
                os.replace(self.target, self._old)
            os.replace(self._new, self.target)
        sync(self.run_folder)
        for leftover in (self._old, self._new):
            shutil.rmtree(leftover, ignore_errors=True)


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file of the base model's holds; nothing if that is no object."""
    try:
        value = read_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def is_spare(history: History) -> Callable[[str], bool]:
    """Whether it is the name of a checkpoint of the history's that nothing needs any more."""
    needed = needed_checkpoints(history)
    # A job under way may have written a checkpoint that the ledger does not know yet.
    busy = tuple(f"trial{s.trial_id:04d}-" for job in history.running.values() for s in job)

    def spare(name: str) -> bool:
        return is_known(name, history.trials) and name not in needed and not name.startswith(busy)

    return spare


def mend(
    exporter: AdapterExporter,
    history: History,
    say: Callable[[str], None],
    tokenizer: Callable[[], Path],
) -> bool:
    """Write the adapter of a run that is over again from its checkpoint, if it was damaged or is another's;
    returns whether it was not as it should be.

    ``tokenizer``: finds a folder with the tokenizer's files.
    """
    best = history.incumbent
    try:
        if best is None or exporter.stands(str(best.best_checkpoint)):
            return False
    except UnreadableError as error:
        say(str(error))
        return True
    wrong = "damaged or another trial's" if exporter.target.is_dir() else "missing"
    say(f"the adapter in {exporter.target} is {wrong}; it is written again")
    try:
        exporter.with_tokenizer(tokenizer()).export(history, best, final=True)
    except (CheckpointError, DiskError, UsageError) as error:
        say(f"it cannot be written again: {error}")
    return True


def exporter_for(exporter: AdapterExporter, shared: str | None) -> AdapterExporter:
    """The exporter of a run whose checkpoints lie where ``shared`` says: the run's own place.

    Raises:
        SettingsError: no package here knows the URL's protocol.
    """
    if url := url_of(shared):
        return SharedExporter(**vars(exporter), store=open_store(url))
    folder = folder_of(shared)
    if folder is None:
        return exporter
    return replace(exporter, checkpoint_path=folder, owner=place_name(str(shared)))


@dataclass(kw_only=True)
class SharedExporter(AdapterExporter):
    """Exports from copies of checkpoints that lie behind a URL."""

    store: CheckpointStore
    clock: Callable[[], float] = time.monotonic
    unswept_until: float = -math.inf
    """The store is left alone until then: it did not answer."""

    def _source(self, state: TrialState) -> tuple[Path, Mapping[str, str]]:
        """As of a checkpoint here, which is fetched unless the adapter is made from the exported one."""
        name = state.best_checkpoint
        if state.exported is None or state.exported.name != name:
            copy = checkpoint_in(self.checkpoint_path, name)
            try:
                sums.check(copy, sums.ADAPTER_FILES)
            except (CheckpointError, UnreadableError):
                remove_checkpoints(copy.parent, self.owner, lambda other: other == name)
                self.store.get(str(name), copy, COPIED)
        return super()._source(state)

    def missing(self, names: Iterable[str]) -> dict[str, str]:
        """Which of these checkpoints are obviously not whole, and why; sums are not looked at. Of a store
        that does not answer now nothing is said."""
        try:
            return self.store.flaws(names)
        except UnreadableError as error:
            LOGGER.warning("Whether all checkpoints are there is not known. %s", error)
            return {}

    def sweep(self, history: History) -> None:
        """Remove the checkpoints that nothing needs from the store, and all copies but the best one's."""
        best = history.incumbent
        kept = best.best_checkpoint if best is not None else None
        remove_checkpoints(
            self.checkpoint_path,
            self.owner,
            lambda name: is_known(name, history.trials) and name != kept,
        )
        if self.keep_checkpoints or self.clock() < self.unswept_until:
            return
        spare, store = is_spare(history), replace(self.store, patience=ONCE)
        try:
            for name in store.names():
                if spare(name):
                    store.remove(name)
        except DiskError as error:
            self.unswept_until = self.clock() + PAUSE_SECONDS
            LOGGER.warning("Checkpoints that nothing needs are still there. %s", error)
