"""Where a study is kept: the database's URL, its driver and its password, and how it is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetsearch.core.errors import SettingsError
from budgetsearch.core.events import Opened
from budgetsearch.core.secrets import password_in, remember, shown_url, without_secrets
from budgetsearch.storage.repair import SIDECARS
from budgetsearch.storage.runfolder import RunFolder

if TYPE_CHECKING:
    from sqlalchemy.engine import URL


PASSWORD = "BUDGETSEARCH_STORAGE_PASSWORD"
"""The environment variable that may hold what a storage's URL leaves out."""
LOCK_SECONDS = 2.0
"""SQLite waits so long for somebody else's lock; later it is tried again."""
CONNECT_SECONDS = 5
"""A server that does not answer is given up after so long."""
LIBPQ: Mapping[str, int] = {
    "connect_timeout": CONNECT_SECONDS,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}
"""A connection whose other end is gone must fail within seconds; milliseconds, then seconds and a count.
Source: the libpq manual, connection parameters."""
SECRET_WORDS = ("password", "passwd", "pwd")
"""Where drivers take a password from a URL's query."""
IN_QUERY = re.compile(rf"([?&])(?:{'|'.join(SECRET_WORDS)})=[^&]*(?:&|$)")
NO_DRIVER = re.compile(r"^postgres(ql)?://")


# ------------------------------------------------------------------------------ the URL


def check_url(url: str) -> None:
    """Refuse what no database can stand behind here.

    Raises:
        SettingsError: the URL cannot be read, or its database's driver is not installed.
    """
    import sqlalchemy

    if "@" in password_in(url):
        raise SettingsError(f"--storage {shown(url)!r} has more than one @: write that in a password as %40.")
    try:
        found = _parsed(url)
        remember(_password(url))
        remember(os.environ.get(PASSWORD, ""))
        dialect = found.get_dialect()
        dialect.import_dbapi()
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise SettingsError(
            f"--storage {shown(url)!r} is no database that Optuna can use "
            f"({hidden(str(error), url)}). Use something like sqlite:///study.sqlite, or leave it out."
        ) from error
    except ImportError as error:
        remedy = "Install its driver"
        if NO_DRIVER.match(url) or url.startswith("postgresql+psycopg:"):
            remedy = "Install it with `pip install 'budgetsearch[postgresql]'`"
        raise SettingsError(
            f"--storage {shown(url)!r} needs a Python package that is not here ({error}). {remedy}, or "
            "leave --storage out."
        ) from error


def shown(url: str) -> str:
    """The URL as it may stand in a log."""
    return shown_url(url)


def hidden(text: str, url: str) -> str:
    """An error's text without the password of the URL that it came from, however it is spelled there."""
    remember(_password(url))
    return without_secrets(text.replace(url, shown(url)))


def without_password(url: str) -> str:
    """The URL as the ledger keeps it: whoever goes on brings the password along."""
    from sqlalchemy.engine import URL

    found = _parsed(url)
    if found.password:
        bare = URL.create(
            found.drivername, found.username, None, found.host, found.port, found.database, found.query
        )
        url = bare.render_as_string(hide_password=False)
    return IN_QUERY.sub(r"\1", url).rstrip("?&")


def has_password(url: str | None) -> bool:
    """Tell whether a password goes with the URL: in it, or in the environment."""
    return bool(url) and bool(_password(connectable(str(url))))


def connectable(url: str) -> str:
    """The URL with the driver that is here, and with the environment's password where it has none."""
    found = _parsed(url)
    given = os.environ.get(PASSWORD, "")
    if found.get_backend_name() == "sqlite" or _password(url) or not given:
        return _with_driver(url)
    return found.set(password=given).render_as_string(hide_password=False)


def of_resumed(written: str, given: str | None, had_password: bool) -> str:
    """The storage of a run that goes on: what is ``given`` anew, else what its ledger has ``written``.

    Raises:
        SettingsError: the URL cannot be used, or the run had a password and nobody says which.
    """
    url = given or written
    check_url(url)
    if had_password and not has_password(url) and not _libpq_knows(url):
        raise SettingsError(
            f"The study's storage {shown(url)} needs its password, which is written down nowhere. Set "
            f"{PASSWORD} (for PostgreSQL, PGPASSWORD or ~/.pgpass do as well), or give the URL with its "
            "password again: --storage URL."
        )
    return url


def _libpq_knows(url: str) -> bool:
    """Tell whether PostgreSQL's own library may find a password by itself."""
    found = _parsed(url)
    if found.get_backend_name() != "postgresql":
        return found.get_backend_name() == "sqlite"
    files = (os.environ.get("PGPASSFILE"), found.query.get("passfile"), Path.home() / ".pgpass")
    return bool(os.environ.get("PGPASSWORD")) or any(file and Path(str(file)).is_file() for file in files)


def _with_driver(url: str) -> str:
    """``postgresql://`` means psycopg 3, or psycopg2 where only that is installed."""
    driver = "psycopg2" if find_spec("psycopg2") and not find_spec("psycopg") else "psycopg"
    return NO_DRIVER.sub(f"postgresql+{driver}://", url)


def _parsed(url: str) -> URL:
    import sqlalchemy

    return sqlalchemy.engine.make_url(_with_driver(url))


def _password(url: str) -> str:
    import sqlalchemy

    try:
        found = _parsed(url)
    except sqlalchemy.exc.ArgumentError:
        return ""
    in_query = next((found.query[word] for word in SECRET_WORDS if word in found.query), "")
    return str(found.password or in_query or "")


# ------------------------------------------------------------------------- the database


def open_storage(url: str) -> Any:
    """Optuna's storage behind a URL; whoever is done with it calls ``close_storage``."""
    import optuna

    found = _parsed(url)
    options: dict[str, Any]
    if found.get_backend_name() == "sqlite":
        options = {"connect_args": {"timeout": LOCK_SECONDS}}
    else:
        # A connection from before an outage is noticed and made anew.
        options = {"pool_pre_ping": True}
        if found.get_driver_name() in ("psycopg", "psycopg2"):
            limits = {name: value for name, value in LIBPQ.items() if name not in found.query}
            options["connect_args"] = limits
    storage = optuna.storages.RDBStorage(url, engine_kwargs=options)
    if found.get_backend_name() == "sqlite":
        _hurry(storage.engine)
    return storage


@contextmanager
def fresh_file(path: Path) -> Iterator[Any]:
    """Give an empty SQLite storage that takes the place of ``path`` when all has gone well inside: a process
    that dies meanwhile leaves what was there.

    Raises:
        OSError: it cannot be put in its place.
    """
    fresh = path.with_name(f"{path.name}.new")
    forget_file(fresh)
    try:
        storage = open_storage(file_url(fresh))
        try:
            yield storage
        finally:
            close_storage(storage)
        _remove(path, SIDECARS)  # with another file in its place they would be taken for that one's
        os.replace(fresh, path)
    finally:
        forget_file(fresh)


def forget_file(path: Path) -> None:
    """Remove a study and what SQLite keeps beside it: it is made again from the ledger."""
    _remove(path, ("", *SIDECARS))


def _remove(path: Path, ends: Iterable[str]) -> None:
    for end in ends:
        path.with_name(path.name + end).unlink(missing_ok=True)


def reason(error: BaseException) -> str:
    """Find what the database's driver said, in a line; libraries wrap it in advice of their own."""
    said: BaseException = error
    cause: BaseException | None = error
    while said is error and cause is not None:
        said = getattr(cause, "orig", None) or error
        cause = cause.__cause__ or cause.__context__
    return str(said).strip().partition("\n")[0]


def close_storage(storage: Any) -> None:
    """Close every connection; safe with a database that is gone."""
    try:
        storage.remove_session()
        storage.engine.dispose()
    except Exception:
        pass  # what cannot be closed is closed at the other end


def _hurry(engine: Any) -> None:
    """Write without waiting for the disk: the study can be made again from the ledger at any time."""
    import sqlalchemy

    @sqlalchemy.event.listens_for(engine, "connect")
    def set_pragmas(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    engine.dispose()  # connections made so far would wait


@contextmanager
def one_transaction(storage: Any) -> Iterator[None]:
    """Write all that is written inside together, or nothing of it; in memory it makes no difference.

    Optuna commits each operation by itself; a trial takes a dozen of them.
    """
    if not hasattr(storage, "scoped_session"):
        yield
        return
    sessions = storage.scoped_session
    joined = _Joined(sessions())
    storage.scoped_session = joined
    try:
        yield
        joined.finish()
    finally:
        storage.scoped_session = sessions
        sessions.remove()  # rolls back what was not committed


class _Joined:
    """Stands for the storage's sessions: each commit waits for the one at the end."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._lost = False

    def __call__(self) -> _Joined:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def commit(self) -> None:
        self._session.flush()

    def close(self) -> None:
        self._session.expunge_all()

    def rollback(self) -> None:
        """Optuna passes over some conflicts; here they take what came before with them."""
        self._lost = True
        self._session.rollback()

    def finish(self) -> None:
        if self._lost:
            raise RuntimeError("another program changed the study at the same time")
        self._session.commit()


def storage_url(given: str | None, folder: RunFolder) -> str:
    """The Optuna storage of a run: what ``--storage`` says, else SQLite in its folder."""
    return given or file_url(folder.study)


def file_url(path: Path) -> str:
    """The SQLite storage in a file."""
    # Optuna fills in what stands in braces.
    return f"sqlite:///{path}".replace("{", "{{").replace("}", "}}")


def anchored_storage(url: str | None) -> str | None:
    """The same storage with an absolute path."""
    prefix, _, path = (url or "").partition("sqlite:///")
    return f"sqlite:///{Path(path).expanduser().absolute()}" if path and not prefix else url


def resumed_storage(opened: Opened, given: str | None) -> str | None:
    """The Optuna storage of a run that goes on; ``given``: its URL again, with its password.

    Raises:
        SettingsError: the URL cannot be used, or its password is missing.
    """

    written = opened.settings.get("storage")
    if not written:
        return None  # its study lies in its folder
    return of_resumed(str(written), anchored_storage(given), bool(opened.facts.get("storage_password")))
