"""What ``budgetsearch submit`` does: look, gather, write a folder that is whole, and try it."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from budgetsearch.core.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    DiskError,
    ModelError,
    RunFolderError,
    UsageError,
)
from budgetsearch.core.ports import Say
from budgetsearch.machine.configs import find_shape
from budgetsearch.machine.host import gib
from budgetsearch.machine.memory import Training, answering
from budgetsearch.machine.profiles import profile
from budgetsearch.run.export import LICENCE_FILES
from budgetsearch.run.manifest_schema import MANIFEST, Manifest, read
from budgetsearch.run.permissions import Places
from budgetsearch.run.settings import Settings
from budgetsearch.run.winner import Winner, finished, settings_of, winner_of
from budgetsearch.storage.files import cache_folder, fresh_folder, remedy, why_not
from budgetsearch.tools.submit.entry import Entry, Fit, Submitting
from budgetsearch.tools.submit.licences import check_licences, licences_of
from budgetsearch.tools.submit.packages import changed, pinned, torch_index, write_wheel
from budgetsearch.tools.submit.page import page
from budgetsearch.tools.submit.rehearsal import rehearse
from budgetsearch.tools.submit.steps import ADAPTER, BASE, FETCH, REQUIREMENTS, Steps
from budgetsearch.training.data.gym import GYM
from budgetsearch.training.data.models import ORIGIN, hashed_files
from budgetsearch.training.data.origins import copy_source, locate, on_hub, origins_of
from budgetsearch.training.data.provenance import source_facts
from budgetsearch.training.sums import SUMS_FILE, check_sums, read_sums
from budgetsearch.views.card import CARD_FILE

ROWS = (8, 4, 2, 1)
"""Answers at once: as many of these as the card holds."""
LENGTH = 2048
"""Tokens of prompt and answer, for which memory is foreseen: what the challenge's API takes by default."""
SPARE = 64 * 2**20
"""Bytes beside the copies: texts, this package, what a file system rounds up."""


def submit(
    run: Path,
    out: Path,
    how: Submitting = Submitting(),  # noqa: B008  # frozen
    given: Places = Places(),  # noqa: B008  # frozen
    say: Say = lambda line: None,
) -> Entry:
    """Make an entry to the challenge of a finished run, in a new folder.

    Raises:
        UsageError: the run is not finished or no adapter's, ``out`` exists, a licence is not known to be
            open, it does not fit the card, base or data are not what they were, or nobody else has the base.
        BudgetsearchError: the steps do not work in a fresh virtual environment.
        DiskError: there is no room, or it ran out; nothing half-written stays.
    """
    history = finished(run)
    winner, settings = winner_of(run), settings_of(history)
    if reason := why_not(out):
        raise RunFolderError(f"--out {out} cannot be made ({reason}). Name a folder that does not exist yet.")
    licences = licences_of(winner.told["base"], winner.told["data"])
    check_licences(licences, checked=how.licences_checked)
    work = _Work(winner, read(winner.folder).manifest, settings, how, given, say)
    versions = pinned(work.extras)
    work.find_base()
    entry = Entry(
        folder=str(out),
        base=work.source,
        revision=winner.told["base"].get("revision"),
        sha256=str(winner.told["base"]["sha256"]),
        copied=how.copy_base,
        quantization=winner.quantization,
        fit=work.fit(),
        budget_seconds=float(winner.told["budget_seconds"]),
        winner_seconds=sum(link.seconds for link in work.manifest.training),
        licences=tuple(licence.line for licence in licences),
        checked=how.licences_checked and not all(licence.is_open for licence in licences),
        changed=tuple(changed(work.manifest.versions, versions)),
        answer=None,
    )
    work.check_room(out)
    with _made(out) as fresh:
        return work.write(fresh, entry, versions)


@dataclass
class _Work:
    """A winner, and what goes into the folder with it."""

    winner: Winner
    manifest: Manifest
    settings: Settings
    how: Submitting
    given: Places
    say: Say
    source: str = ""
    """Where the base comes from."""
    base: Path = Path()
    """Where it lies here."""

    @property
    def extras(self) -> tuple[str, ...]:
        """Whose packages the images need: the server's, and on a card the kernels that training wore."""
        fused = not self._on_cpu and "liger-kernel" in self.manifest.versions
        return ("serve", "gpu") if fused else ("serve",)

    def find_base(self) -> None:
        """Insist on the base of training, which others can have too.

        Raises:
            UsageError: it is another one, lies on this machine alone, or runs code that nobody allowed now.
        """
        if self.settings.trust_remote_code and not self.given.trust_remote_code:
            raise UsageError(
                "The run let code of its base model run, so the images would too. Read it, then allow it "
                "with --trust-remote-code."
            )
        self.source = str(self.given.model or self.winner.told["base"]["source"])
        self.base = self.winner.base(self.given.model, self.given.trust_remote_code, self.say)
        if Path(self.source).expanduser().exists():
            if not self.how.copy_base:
                raise ModelError(
                    f"The base model lies on this machine ({self.source}), where no image finds it. Copy it "
                    "into the folder with --copy-base, or say with --model where it is fetched from."
                )
            self.source = Path(self.source).name

    def fit(self) -> Fit:
        """As many answers at once as the card holds.

        Raises:
            DeviceError: it does not hold one.
        """
        name, usable = self._card()
        try:
            shape, _ = find_shape(str(self.base), None, cache_folder())
        except ModelError:
            return Fit(name, usable, ROWS[-1], LENGTH, {})
        params = self.winner.told["params"]
        training = Training(
            self.winner.quantization,
            rank=int(params["rank"]),
            targets=str(params.get("targets") or self.settings.targets),
            length=LENGTH,
            device="cpu" if self._on_cpu else "cuda",
        )
        for rows in ROWS:
            parts = asdict(answering(shape, replace(training, micro_batch=rows)))
            fit = Fit(name, usable, rows, LENGTH, parts)
            if fit.fits:
                return fit
        raise DeviceError(
            f"One answer of {LENGTH} tokens takes {gib(int(fit.bytes))}, and {name} has {gib(usable or 0)}: "
            "the entry would not run there. Name the card that it is judged on with --gpu, or search on a "
            "smaller or more quantized base."
        )

    def _card(self) -> tuple[str, int | None]:
        """(name, bytes that programs get) of the card that it is judged on."""
        if self.how.gpu is not None:
            named = profile(self.how.gpu)
            return named.name, named.usable_bytes
        card = self.manifest.card
        return str(card.get("name", "cpu")), card.get("usable_bytes")

    @property
    def _on_cpu(self) -> bool:
        if self.how.gpu is not None:
            return profile(self.how.gpu).name == "cpu"
        return self.manifest.card.get("device") == "cpu"

    def check_room(self, out: Path) -> None:
        """Before anything is written: a disk that is full now will be full then.

        Raises:
            DiskError: it is.
        """
        copies = [path for path in self.winner.folder.rglob("*") if path.is_file()]
        copies += self._base_files() if self.how.copy_base else []
        copies += [
            file for _, source in self._sources() if _is_local(source) for file in locate(source).files
        ]
        need = SPARE + sum(path.stat().st_size for path in copies)
        above = next(path for path in out.absolute().parents if path.exists())
        room = shutil.disk_usage(above).free
        if room < need:
            raise DiskError(
                f"The submission needs {gib(need)}, and {above} has {gib(room)} free. Make room, or name "
                "another disk with --out."
            )

    # -------------------------------------------------------------------------- the folder

    def write(self, fresh: Path, entry: Entry, versions: dict[str, str]) -> Entry:
        """Everything, and then the trial; returns the entry with what it answered."""
        self.say(f"writing {entry.folder}")
        copy_adapter(self.winner.folder, fresh / ADAPTER)
        if self.how.copy_base:
            (fresh / BASE).mkdir()
            for path in self._base_files():
                target = fresh / BASE / path.relative_to(self.base)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        lines = [f"{name}=={version}" for name, version in versions.items()]
        _put(fresh / REQUIREMENTS, "\n".join([f"# Python {platform.python_version()}", *lines]))
        steps = Steps(
            wheel=write_wheel(fresh),
            python=platform.python_version(),
            base=BASE if self.how.copy_base else self.source,
            rows=entry.fit.rows,
            seconds=entry.budget_seconds,
            gpu="cpu" if self._on_cpu else "auto",
            trusted=self.settings.trust_remote_code,
            index=torch_index(versions),
            sources=self._copied_sources(fresh),
        )
        if not steps.copied:
            _put(fresh / FETCH, steps.fetch_code())
        _put(fresh / ".dockerignore", "out")
        _put(fresh / "Dockerfile", steps.inference())
        _put(fresh / "Dockerfile.train", steps.training())
        if self.how.check:
            entry = replace(entry, answer=rehearse(fresh, steps, self.say))
        _put(fresh / CARD_FILE, page(self.winner.name, entry, steps))
        note = {**asdict(entry), "folder": None, "python": steps.python, "sources": dict(steps.sources)}
        _put(fresh / "submission.json", json.dumps(note, indent=2))
        return entry

    def _base_files(self) -> list[Path]:
        """What decides what the base computes, and its terms."""
        beside = (CARD_FILE, ORIGIN, *LICENCE_FILES)
        more = {path for pattern in beside for path in self.base.glob(pattern)}
        return sorted({*hashed_files(self.base, code=self.settings.trust_remote_code), *more})

    def _sources(self) -> Iterator[tuple[str, str]]:
        """(role, source) of all rows."""
        for role in ("data", "valid"):
            for origin in origins_of(getattr(self.given, role) or getattr(self.settings, role) or ""):
                yield role, origin.source

    def _copied_sources(self, fresh: Path) -> dict[str, str]:
        """By role: where the rows of the training image come from; local ones are copied.

        Raises:
            DataError: they are not what they were.
        """
        found: dict[str, str] = {}
        for role in dict.fromkeys(role for role, _ in self._sources()):
            given = getattr(self.given, role) or getattr(self.settings, role)
            expected = [source for source in self.manifest.data.sources if source.role == role]
            lines = []
            for number, origin in enumerate(origins_of(given)):
                place = origin.source
                if _is_local(place):
                    place = copy_source(place, fresh / "data" / f"{role}-{number}")
                    known = expected[number].file if number < len(expected) else None
                    if known is None or (source_facts(place) or {}).get("sha256") != known.sha256:
                        raise DataError(
                            f"{origin.source} is not what the run was trained on. Bring the old rows back, "
                            f"or say with --{role} where they lie."
                        )
                    place = os.path.relpath(place, fresh)
                lines.append(origin.at(place))
            found[role] = "\n".join(lines)
        return found


def copy_adapter(folder: Path, into: Path) -> None:
    """Copy what the adapter's own sums name, them, and the manifest: nothing else that lies there.

    Raises:
        CheckpointError: a file is missing, is a link, or is not what it was.
    """
    into.mkdir()
    check_sums(folder)
    beside = [name for name in (SUMS_FILE, MANIFEST) if (folder / name).exists()]
    for name in (*read_sums(folder), *beside):
        if (folder / name).is_symlink():
            raise CheckpointError(f"{folder / name} is a link, and may lead anywhere; export the run again")
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, into / name)


def _is_local(source: str) -> bool:
    return not source.startswith(GYM) and not on_hub(source)


def _put(path: Path, text: str) -> None:
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


@contextmanager
def _made(out: Path) -> Iterator[Path]:
    """A folder that becomes whole, or goes."""
    try:
        with fresh_folder(out) as fresh:
            yield fresh
    except OSError as error:
        raise DiskError(
            f"{out} could not be written ({error}); {remedy(error)}. Nothing of it stays."
        ) from error
