"""The storage's URL: its driver, and a password that is written down nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from budgetsearch.core.errors import SettingsError
from budgetsearch.views.study import storage
from budgetsearch.views.study.storage import (
    PASSWORD,
    check_url,
    connectable,
    has_password,
    hidden,
    of_resumed,
    without_password,
)

pytest.importorskip("psycopg")
BARE = "postgresql+psycopg://me@host:5432/db"


@pytest.fixture(autouse=True)
def nobody_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No password in the environment, none in the home folder."""
    for name in (PASSWORD, "PGPASSWORD", "PGPASSFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("postgresql://me:secret@host:5432/db", BARE),
        ("postgres://me:secret@host:5432/db", BARE),
        ("postgresql://me:s%40cr%2Fet@host:5432/db?sslmode=require", f"{BARE}?sslmode=require"),
        ("postgresql://host/db?password=secret&user=me", "postgresql://host/db?user=me"),
        ("mysql+pymysql://me:secret@host/db", "mysql+pymysql://me@host/db"),
        (
            "sqlite:///file:/a/b.db?mode=rwc&uri=true&password=secret",
            "sqlite:///file:/a/b.db?mode=rwc&uri=true",
        ),
        ("sqlite:////a/b {x}.db", "sqlite:////a/b {x}.db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
    ],
)
def test_the_ledger_keeps_the_url_without_its_password(url: str, written: str) -> None:
    """Whatever else it says stays."""
    assert written == without_password(url)


def test_the_environment_completes_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever signs the password has; one in the URL goes first, SQLite takes none."""
    monkeypatch.setenv(PASSWORD, "p@ss/{word}")
    assert connectable("postgresql://me@host/db") == "postgresql+psycopg://me:p%40ss%2F%7Bword%7D@host/db"
    assert connectable("postgresql://me:own@host/db") == "postgresql+psycopg://me:own@host/db"
    assert connectable("sqlite:///study.db") == "sqlite:///study.db"
    assert has_password("postgresql://me@host/db")
    assert not has_password(None)


@pytest.mark.parametrize("url", ["postgresql+psycopg2://me@host/db", "mysql+pymysql://me@host/db"])
def test_a_driver_that_is_named_is_kept(url: str) -> None:
    """Only where none is named one is chosen."""
    assert url == connectable(url)


def test_a_resume_takes_the_password_from_wherever_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The URL again, the environment, or what PostgreSQL's own library reads."""
    assert of_resumed(BARE, "postgresql://me:secret@host:5432/db", True).startswith("postgresql://me:secret@")
    for name in (PASSWORD, "PGPASSWORD"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "secret")
            assert BARE == of_resumed(BARE, None, True)
    (tmp_path / ".pgpass").write_text("*:*:*:me:secret\n", encoding="utf-8")
    assert BARE == of_resumed(BARE, None, True)


@pytest.mark.parametrize("given", [None, "postgresql://me@other/db"])
def test_a_resume_without_the_password_names_the_ways_to_give_it(given: str | None) -> None:
    """Before anything is touched."""
    with pytest.raises(SettingsError) as error:
        of_resumed(BARE, given, True)
    for way in (PASSWORD, "PGPASSWORD", "~/.pgpass", "--storage"):
        assert way in str(error.value)


@pytest.mark.parametrize("url", [BARE, "sqlite:///study.db", "sqlite:///file:/a.db?uri=true"])
def test_a_run_that_had_no_password_needs_none(url: str) -> None:
    """Trust, a socket, a file."""
    assert url == of_resumed(url, None, False)


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """How PostgreSQL's is installed; the password stays out."""
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    monkeypatch.setattr(storage, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"budgetsearch\[postgresql\]") as error:
        check_url("postgresql://me:secret@host/db")
    assert "secret" not in str(error.value)


def test_an_error_that_quotes_the_password_is_shown_without_it() -> None:
    """As it is, and as a URL spells it."""
    text = hidden("no: p@ss word, p%40ss%20word, p%40ss+word", "postgresql://me:p%40ss%20word@host/db")
    assert text == "no: ***, ***, ***"
