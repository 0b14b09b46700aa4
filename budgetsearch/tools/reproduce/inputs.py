"""Finding a manifest's base model and data again, and naming what has changed in them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetsearch.core.errors import DataError, ModelError, UsageError
from budgetsearch.core.metric import LOSS
from budgetsearch.core.ports import Say
from budgetsearch.run.manifest_schema import Base, File, Found, Manifest, Rows, Source
from budgetsearch.run.permissions import Places, check_source
from budgetsearch.run.prepare import prepare_inputs
from budgetsearch.storage.files import cache_folder
from budgetsearch.training.data.origins import origins_of

if TYPE_CHECKING:
    from budgetsearch.run.settings import Settings
    from budgetsearch.training.data.models import BaseModel
    from budgetsearch.training.data.tokens import PreparedData


@dataclass(frozen=True)
class Finding:
    """What became of something that the manifest names."""

    what: str
    state: str
    """unchanged, changed, damaged, missing, new, unchecked, or noted (told, and nothing is wrong with it)."""
    detail: str = ""

    @property
    def well(self) -> bool:
        """Whether it is what it was, or nothing that matters."""
        return self.state in ("unchanged", "noted")

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.what} {self.state}" + (f": {self.detail}" if self.detail else "")


@dataclass
class Inputs:
    """Base and data as they are here, and how they compare with the manifest."""

    settings: Settings | None = None
    base: BaseModel | None = None
    prepared: PreparedData | None = None
    findings: list[Finding] = field(default_factory=list)
    base_same: bool = False
    """Whether the base is there and every file of it is what it was."""

    @property
    def well(self) -> bool:
        """Whether everything is what it was."""
        return all(finding.well for finding in self.findings)

    @property
    def problems(self) -> str:
        """Everything that is not, one line each."""
        return "\n".join(f"  {finding.line}" for finding in self.findings if not finding.well)


def look(found: Found, given: Places, say: Say) -> Inputs:
    """Find base and data, fetching what the manifest names, and compare their files with it; load nothing.

    Raises:
        UsageError: the base needs code of its own, and the user has not allowed it.
    """
    from budgetsearch.training.data.models import resolve_again

    manifest, inputs, places = found.manifest, Inputs(), dict[str, str]()
    wanted = bool(manifest.settings.get("trust_remote_code"))
    try:
        places["model"] = _locate(found, "model", manifest.base, given.model)
        inputs.base = resolve_again(
            found.folder,
            places["model"],
            cache_folder(),
            wanted=wanted,
            allowed=given.trust_remote_code,
            revision=manifest.base.revision,
            say=say,
        )
        inputs.findings += _base_findings(manifest.base, inputs.base.path, code=wanted)
        inputs.base_same = inputs.well
    except ModelError as error:
        inputs.findings.append(Finding(f"base {manifest.base.source}", "missing", str(error)))
    whole = True
    for role in dict.fromkeys(source.role for source in manifest.data.sources):
        some = [source for source in manifest.data.sources if source.role == role]
        lines = origins_of(manifest.settings.get(role) or "")
        named = origins_of(getattr(given, role) or "")
        here: list[str] = []
        for index, (source, origin) in enumerate(zip(some, lines, strict=True)):
            try:
                place = _locate(found, role, source, named[index].source if index < len(named) else None)
                inputs.findings += _source_findings(source, place)
                here.append(origin.at(place))
            except (DataError, OSError) as error:
                inputs.findings.append(Finding(f"{role} {source.source}", "missing", str(error)))
        places[role] = "\n".join(here)
        whole = whole and len(here) == len(some)
    if inputs.base is not None and whole:
        inputs.settings = settings_of(manifest, places, trust=wanted and given.trust_remote_code)
    return inputs


def tokenize(inputs: Inputs, manifest: Manifest, say: Say) -> None:
    """Split and tokenize as the run did, and compare the rows in their order."""
    if inputs.settings is None:
        return
    try:
        _, prepared = prepare_inputs(inputs.settings, say)
    except (UsageError, OSError) as error:
        inputs.findings.append(Finding("rows", "missing", str(error)))
        return
    inputs.prepared = prepared
    for name, expected, rows, stats in (
        ("training rows", manifest.data.train, prepared.train, prepared.train_stats),
        ("validation rows", manifest.data.valid, prepared.valid, prepared.valid_stats),
    ):
        inputs.findings.append(_rows_finding(name, expected, rows.sha256(), stats.rows))


def settings_of(manifest: Manifest, places: dict[str, str], *, trust: bool) -> Settings:
    """The run's settings, with where things lie now and whether code of the base may run now.

    Raises:
        UsageError: another version wrote settings that this one does not take.
    """
    from pydantic import ValidationError

    from budgetsearch.run.settings import Settings

    known = {name: value for name, value in manifest.settings.items() if name in Settings.model_fields}
    changed: dict[str, Any] = {"valid": None, **places, "out": None, "storage": None, "shared": None}
    changed |= {"engine": "local", "gpus": None, "address": None}
    changed |= {"metric": LOSS, "direction": None}  # code that a manifest names is not run
    changed |= {"revision": manifest.base.revision, "trust_remote_code": trust}
    try:
        return Settings.model_validate({**known, **changed})
    except ValidationError as error:
        raise UsageError(f"The manifest's settings cannot be used by this version: {error}") from error


def compare_files(owner: str, expected: Sequence[File], found: Sequence[File]) -> Iterator[Finding]:
    """Each file of a folder: unchanged, changed, missing or new."""
    there = {file.name: file for file in found}
    for file in expected:
        yield compare_file(f"{owner} {file.name}", file, there.pop(file.name, None))
    for name in sorted(there):
        yield Finding(f"{owner} {name}", "new", "it was not there when the run began")


def compare_file(what: str, expected: File, found: File | None) -> Finding:
    """One file against what it was."""
    if found is None:
        return Finding(what, "missing", f"sha256 {expected.sha256} is expected")
    if found.sha256 == expected.sha256:
        return Finding(what, "unchanged")
    sizes = "" if found.bytes == expected.bytes else f", {found.bytes} bytes instead of {expected.bytes}"
    return Finding(what, "changed", f"sha256 {found.sha256}, expected {expected.sha256}{sizes}")


def _base_findings(base: Base, folder: Path, *, code: bool) -> Iterator[Finding]:
    """Hashed now: what the cache remembers of a file may be older than a changed byte. Code counts where it
    runs."""
    from budgetsearch.training.data.models import hashed_files
    from budgetsearch.training.data.provenance import file_facts
    from budgetsearch.training.data.trust import uses_code

    code = code and uses_code(folder)
    expected = [file for file in base.files if code or not file.name.endswith(".py")]
    found = [
        File(**{**file_facts(path), "name": path.relative_to(folder).as_posix()})
        for path in hashed_files(folder, code=code)
    ]
    return compare_files("base", expected, found)


def _source_findings(source: Source, place: str) -> Iterator[Finding]:
    from budgetsearch.training.data.provenance import source_facts

    facts = source_facts(place)
    what = f"{source.role} {source.source}"
    if source.file is None:
        yield Finding(what, "unchanged" if place == source.source else "changed", "generated")
        return
    yield compare_file(what, source.file, File(**facts) if facts else None)


def _rows_finding(name: str, expected: Rows, sha256: str, rows: int) -> Finding:
    if sha256 == expected.sha256:
        return Finding(name, "unchanged")
    wanted = expected.stats.get("rows")
    count = "" if rows == wanted else f"{rows} rows, expected {wanted}; "
    sums = f"sha256 {sha256}, expected {expected.sha256}"
    return Finding(name, "changed", f"{count}their tokens or their order: {sums}")


def _locate(found: Found, flag: str, wanted: Base | Source, given: str | None) -> str:
    """Where a source lies now: as given, where the run found it, or beside the working folder.

    Raises:
        ModelError, DataError: a local one is nowhere.
        SettingsError: it would be fetched for a folder from elsewhere.
    """
    if given is not None:
        return given
    if wanted.path is None:
        check_source(found.folder, flag, wanted.source, given)
        return wanted.source
    homes = [found.folder, found.folder.parent]
    if found.folder.name == "adapter":
        homes.reverse()  # paths are seen from the run folder
    for place in (*(home / wanted.path for home in homes), Path.cwd() / wanted.source):
        if place.exists():
            # Without links in its folder's name, along which .. would not lead back; its own name counts.
            return os.path.join(os.path.realpath(place.parent), place.name)
    kind: Any = ModelError if flag == "model" else DataError
    raise kind(
        f"{wanted.source} is not where the run found it ({wanted.path}, from the run's folder): it or "
        f"the run was moved. Say where it lies now with --{flag} PATH."
    )
