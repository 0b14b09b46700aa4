"""What ``budgetsearch export`` does, in one call: make, load again, compare, and only then put in place."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from budgetsearch.core.errors import BudgetsearchError, DiskError, RunFolderError
from budgetsearch.core.ports import Say
from budgetsearch.machine.anatomy import table_of
from budgetsearch.machine.detect import Card, detect
from budgetsearch.machine.gguf_files import read_once
from budgetsearch.run.export import GENERATION_FILE, LICENCE_FILES, TOKENIZER_FILES
from budgetsearch.run.permissions import Places
from budgetsearch.run.winner import MERGED, Winner, finished, settings_of, winner_of
from budgetsearch.storage.files import fresh_folder, remedy, why_not
from budgetsearch.storage.runfolder import MANIFEST_FILE
from budgetsearch.tools.export import gguf_file
from budgetsearch.tools.export.card import export_card
from budgetsearch.tools.export.hub import check_hub, files_of, push
from budgetsearch.tools.export.losses import Rows, rows_of
from budgetsearch.tools.export.merge import merge
from budgetsearch.tools.export.ollama import modelfile
from budgetsearch.tools.export.wanted import Compared, Made, Wanted
from budgetsearch.training import sums
from budgetsearch.views.card import CARD_FILE

FILE = "model.gguf"
SPARE = 64 * 2**20
"""Bytes beside the weights: tokenizer, card, what a file system rounds up."""
BYTES = {"merged": 2.0, "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07}
"""Of a weight, at most, by the form; of the coarser ones as of q8_0, in which the ends are held."""


def export(
    run: Path,
    wanted: Wanted,
    *,
    given: Places = Places(),  # noqa: B008  # frozen
    gpu: str | None = None,
    say: Say = lambda line: None,
) -> list[Made]:
    """Make the wanted forms of a finished run's adapter. A form that does not compute what the adapter does
    is not put in place.

    Raises:
        UsageError: nothing is asked for, the run is not finished, the target exists, the family is unknown to
            package gguf, base or data are not what they were, or there is no token for the Hub.
        BudgetsearchError: a form came back with another loss, or the Hub refuses.
        DiskError: there is no room, or it ran out; nothing half-written stays.
    """
    wanted.check()
    if wanted.kind is not None:
        gguf_file.check_kind(wanted.kind)
    if wanted.hub is not None:
        check_hub(wanted.hub, dry=wanted.dry_run)
    winner, folders = winner_of(run), wanted.folders(run)
    history = finished(run)
    for folder in folders.values():
        if reason := why_not(folder):
            raise RunFolderError(f"{folder} cannot be made ({reason}). Name another place with --out.")
    made: list[Made] = []
    if folders:
        from budgetsearch.training.quiet import quiet

        settings = settings_of(history)
        card = detect(gpu or settings.gpu, None if gpu else settings.device)
        os.environ.update(card.environment)
        rows = rows_of(run, history, given, say)
        trusted = settings.trust_remote_code and given.trust_remote_code
        with quiet():
            made = list(_Work(winner, rows, card, trusted, say).make(wanted, folders))
    if wanted.hub is not None:
        made.append(_pushed(folders.get("gguf") or folders.get("merged") or winner.folder, wanted, say))
    return made


def _pushed(folder: Path, wanted: Wanted, say: Say) -> Made:
    assert wanted.hub is not None
    files = files_of(folder)
    if wanted.dry_run:
        return Made("dry run", wanted.hub, files=files)
    say(f"pushing {len(files)} files of {folder} to {wanted.hub}, which is private until you say otherwise")
    return Made("hub", push(folder, wanted.hub), files=files)


@dataclass
class _Work:
    """A winner with what it is compared on."""

    winner: Winner
    rows: Rows
    card: Card
    trusted: bool
    say: Say

    @property
    def half(self) -> str:
        """The card's 16-bit type."""
        return "fp16" if self.card.profile.dtype == "fp16" else "bf16"

    def make(self, wanted: Wanted, folders: Mapping[str, Path]) -> Iterator[Made]:
        """Each form in its folder, checked."""
        from budgetsearch.training.memory import free

        self.check_room(wanted, folders)
        self.say("loading base and adapter as they were trained")
        trained = self.winner.load(self.rows.base, self.card, self.trusted)
        own = self.rows.loss(trained, self.card.device, self.half)
        whole = self._merged(trained)
        del trained
        free(self.card.device)
        for form, folder in folders.items():
            with self._made(folder) as fresh:
                if form == "merged":
                    uses, name = ["merged"], "merged"
                    self._write_merged(whole, fresh)
                    again = self._loss_of_merged(fresh)
                else:
                    uses, name = ["gguf", *(["ollama"] if wanted.ollama else [])], str(wanted.kind)
                    self._write_gguf(whole, fresh, wanted)
                    again = self._loss_of_gguf(fresh)
                compared = Compared(name, self.winner.quantization, self.rows.count, own, again)
                self.say(compared.line)
                if not compared.well:
                    raise BudgetsearchError(
                        f"The {name} export does not compute what the adapter does: {compared.line}. It was "
                        "not kept; the adapter itself is unharmed."
                    )
                self._finish(fresh, compared, uses)
            yield Made(name, str(folder), compared, files_of(folder))

    def check_room(self, wanted: Wanted, folders: Mapping[str, Path]) -> None:
        """Before anything is loaded: a disk that is full now will be full then.

        Raises:
            DiskError: it is.
        """
        weights = sum(prod(shape) for shape in table_of(self.rows.base).values())
        need = sum(
            weights * BYTES.get("merged" if form == "merged" else str(wanted.kind), BYTES["q8_0"]) + SPARE
            for form in folders
        )
        above = next(iter(folders.values())).absolute()
        while not above.exists():
            above = above.parent
        room = shutil.disk_usage(above).free
        if room < need:
            raise DiskError(
                f"The export needs about {need / 1e9:.1f} GB, and {above} has {room / 1e9:.1f} GB free. Make "
                "room, or name another disk with --out."
            )

    def _merged(self, trained: Any) -> Any:
        from budgetsearch.training.bases import whole_base

        whole = whole_base(str(self.rows.base), "bf16", "cpu", trust_remote_code=self.trusted, half=self.half)
        changed = merge(trained, whole)
        self.say(f"merged the adapter into {changed} layers")
        return whole

    # ------------------------------------------------------------------------- the forms

    def _write_merged(self, whole: Any, folder: Path) -> None:
        whole.save_pretrained(folder)
        (folder / GENERATION_FILE).unlink(missing_ok=True)  # the adapter's says where answers end
        self._copy(folder, (*TOKENIZER_FILES, GENERATION_FILE, *LICENCE_FILES))
        told = {key: value for key, value in self.winner.told.items() if key != "load"}
        told = {**told, "quantization": "bf16", MERGED: {"quantization": self.winner.quantization}}
        text = json.dumps(told, indent=2)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    def _loss_of_merged(self, folder: Path) -> float:
        from budgetsearch.training.bases import load_base

        kind = "fp32" if self.card.device == "cpu" else "bf16"
        model = load_base(str(folder), kind, self.card.device, trust_remote_code=self.trusted, half=self.half)
        return self.rows.loss(model, self.card.device, self.half)

    def _write_gguf(self, whole: Any, folder: Path, wanted: Wanted) -> None:
        from budgetsearch.training.data.apart import EncoderApart

        with closing(EncoderApart(self.winner.folder)) as encoder:
            tokenizer, stops = encoder.tokenizer, encoder.reader.stops
            if wanted.ollama:
                ends = [str(end) for end in tokenizer.convert_ids_to_tokens(stops)]
                (folder / "Modelfile").write_text(modelfile(encoder, ends, FILE), encoding="utf-8")
        gguf_file.write(whole, tokenizer, stops, folder / FILE, str(wanted.kind))
        self._copy(folder, LICENCE_FILES)

    def _loss_of_gguf(self, folder: Path) -> float:
        import torch
        from transformers import AutoModelForCausalLM

        from budgetsearch.training.modes import HALVES

        dtype = torch.float32 if self.card.device == "cpu" else HALVES[self.half]
        # transformers draws bars while it reads a GGUF file, whatever its settings say.
        with redirect_stderr(io.StringIO()), read_once():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=FILE,
                dtype=dtype,
                trust_remote_code=False,
                device_map={"": self.card.device},
            )
        return self.rows.loss(model.eval().requires_grad_(False), self.card.device, self.half)

    def _copy(self, folder: Path, patterns: tuple[str, ...]) -> None:
        for path in {path for pattern in patterns for path in self.winner.folder.glob(pattern)}:
            shutil.copyfile(path, folder / path.name)

    def _finish(self, folder: Path, compared: Compared, uses: list[str]) -> None:
        (folder / CARD_FILE).write_text(export_card(self.winner, compared, uses), encoding="utf-8")
        note = {**asdict(compared), "share": compared.share}
        (folder / "compared.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        sums.write_sums(folder)

    @contextmanager
    def _made(self, folder: Path) -> Iterator[Path]:
        """A folder that becomes whole, or goes."""
        self.say(f"writing {folder}")
        try:
            with fresh_folder(folder) as fresh:
                yield fresh
        except OSError as error:
            raise DiskError(
                f"{folder} could not be written ({error}); {remedy(error)}. Nothing of it stays."
            ) from error
