"""Passwords of every kind: none stands in what is shown or written, and looking for them takes no time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from budgetsearch.core import secrets
from budgetsearch.core.errors import SettingsError
from budgetsearch.core.secrets import MAX_CHARACTERS, shown_settings, shown_url, without_secrets
from budgetsearch.storage.lock import Owner
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.study.storage import check_url, without_password

BEGIN, END = "hunter2", "wonderful"
ODD = ["'", '"', " ", "@", "/", "?", "#", "&", "%", "=", ":", "://", "\n", "\\", "ä", "password=", "';--"]
"""What has broken a pattern somewhere."""
BODIES = st.one_of(st.sampled_from(ODD), st.text(max_size=12), st.lists(st.sampled_from(ODD)).map("".join))
URLS = {
    "raw": lambda password: f"postgresql://me:{password}@host:5432/db",
    "escaped": lambda password: f"postgresql://me:{quote(password, safe='')}@host/db?sslmode=require",
    "nobody's": lambda password: f"redis://:{password}@host/0",
    "in the query": lambda password: f"postgresql://me@host/db?password={quote_plus(password)}&x=1",
    "of a file": lambda password: f"sqlite:///file:/tmp/a.db?uri=true&db_password={quote_plus(password)}",
}
"""Where a password stands in a URL."""
TIMES = {
    "a name": "a" * 200_000,
    "colons": "a:" * 100_000,
    "users": "x:y@" * 50_000,
    "words": "password" * 25_000,
    "equals": "token=" * 30_000 + "x",
    "blanks": " " * 200_000,
    "addresses": "://" * 60_000,
}
"""Texts that cost a pattern seconds."""


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_met", set())


def leaks(text: str) -> bool:
    """Whether a part of the password stands there."""
    return BEGIN in text or END in text


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES)
@example(body="it's")
@example(body="two words")
def test_no_password_stands_in_what_a_run_writes_of_its_settings(
    url: object, body: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Not in settings.json, and not in the lock, however the flag is written."""
    whole = url(f"{BEGIN}{body}{END}")  # type: ignore[operator]
    assert not leaks(json.dumps(shown_settings({"storage": whole, "shared": whole})))
    for words in (["run", "--storage", whole], ["run", f"--storage={whole}"]):
        before, sys.argv = sys.argv, ["budgetsearch", *words]
        try:
            assert not leaks(Owner.this_process().to_json())
        finally:
            sys.argv = before


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES)
@example(body="it's")
@example(body="a@b")
def test_a_password_that_was_met_stands_in_no_text(body: str) -> None:
    """Of a traceback, a notice or an error: raw, escaped, or as Python or a shell quotes it. The ledger's URL
    has none either, and one that cannot be read is refused."""
    password = f"{BEGIN}{body}{END}"
    url = URLS["raw"](password)
    try:
        check_url(url)
    except SettingsError as error:
        said = str(error)
    else:
        said = without_password(url)
        for form in (password, quote(password, safe=""), quote_plus(password), repr(password), repr([url])):
            said += without_secrets(f"could not connect with {form} to the host")
    assert not leaks(said)


def test_settings_json_of_a_run(tmp_path: Path) -> None:
    """The file itself, with a quote and a blank in the password."""
    folder = RunFolder(tmp_path)
    folder.prepare({"storage": f"postgresql://me:{BEGIN}'it is' {END}@host/db"}, "mine")
    assert {"storage": "postgresql://me:***@host/db"} == json.loads(
        folder.settings.read_text(encoding="utf-8")
    )


@pytest.mark.parametrize(
    "url", ["sqlite:////home/me/a:b/c@d.db", "s3://bucket/a=b", "postgresql://me@host:5/db"]
)
def test_what_is_no_password_is_shown(url: str) -> None:
    """Paths, ports and users say where a study is."""
    assert url == shown_url(url)


@pytest.mark.parametrize("text", TIMES.values(), ids=TIMES)
def test_looking_for_passwords_takes_no_time(text: str) -> None:
    """Whatever stands in a notice or a traceback; a URL of that length as well."""
    start = time.perf_counter()
    without_secrets(text)
    shown_url(text)
    assert time.perf_counter() - start < 1.0


def test_a_long_text_keeps_its_ends() -> None:
    """And no half of a URL at the place where it was cut."""
    url = f"postgresql://me:{BEGIN}{'x' * 200}{END}@host/db"
    for offset in range(0, 250, 10):
        filler = "word " * (MAX_CHARACTERS // 10)
        found = without_secrets(
            "begin " + filler[: MAX_CHARACTERS // 2 - 6 - offset] + f" {url} " + filler * 2 + "end"
        )
        assert not leaks(found)
        assert found.startswith("begin") and found.endswith("end") and "characters are left out" in found
        assert len(found) < MAX_CHARACTERS + 100
