"""A real PostgreSQL of the tests' own: on a free loopback port, in a temporary folder, never as root."""

from __future__ import annotations

import fcntl
import functools
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

INSTALL_SECONDS = 240
"""The suite tries so long, once, to fetch what is not there."""
USER = "searcher"
HOW = "`apt-get install postgresql` as root brings it"


def find() -> Path | None:
    """The folder with the newest server's programs."""
    places = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"),
        key=lambda p: int(re.sub(r"\D", "", p.parts[-3]) or 0),
    )
    on_path = shutil.which("initdb")
    return places[-1].parent if places else Path(on_path).resolve().parent if on_path else None


@functools.cache
def programs() -> Path:
    """The same; on a Debian machine with root a server is installed first. Skips where there is none."""
    lock = Path(tempfile.gettempdir()) / f"budgetsearch-tests-postgresql-{os.getuid()}.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another test process may be at it
        found = find() or _install()
    if found is None:
        pytest.skip(f"PostgreSQL is not here and could not be installed; {HOW}")
    return found


def _install() -> Path | None:
    tried = Path(tempfile.gettempdir()) / f"budgetsearch-tests-postgresql-{os.getuid()}.tried"
    if os.getuid() != 0 or not shutil.which("apt-get") or tried.exists():
        return None
    tried.touch()
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "postgresql"]):
        try:
            subprocess.run(
                ["apt-get", "-q", *arguments], env=environment, timeout=INSTALL_SECONDS, check=True,
                capture_output=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except (subprocess.SubprocessError, OSError):
            return None
    return find()


def _as_somebody() -> dict[str, Any]:
    """How a server is started that refuses to run as root."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no other user")


@dataclass
class Server:
    """A database server that can be stopped, started, and made to stand still."""

    folder: Path
    port: int
    password: str

    @classmethod
    def made(cls, password: str) -> Server:
        """A new one, running, whose only user needs the password."""
        place = programs()
        folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
        somebody = _as_somebody()
        if somebody:
            os.chown(folder, somebody["user"], somebody["group"])
        secret = folder / "password"
        secret.write_text(password, encoding="utf-8")
        if somebody:
            os.chown(secret, somebody["user"], somebody["group"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = cls(folder, port, password)
        server._call(
            [
                *(str(place / "initdb"), "-D", "data", "-U", USER, "-A", "scram-sha-256"),
                *("--pwfile", str(secret), "--no-sync", "-E", "UTF8", "--locale=C"),
            ]
        )
        secret.unlink()
        server.start()
        return server

    def url(self, *, password: bool = True) -> str:
        """For ``--storage``."""
        secret = f":{quote(self.password, safe='')}" if password else ""
        return f"postgresql://{USER}{secret}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._call([*self._ctl(), "-w", "-t", "60", "-l", "server.log", "-o", options, "start"])

    def stop(self) -> None:
        """Stop it at once, as if its machine were gone."""
        self._call([*self._ctl(), "-m", "immediate", "-w", "stop"])

    def runs(self) -> bool:
        """Whether it is up."""
        return (self.folder / "data" / "postmaster.pid").exists()

    def freeze(self, frozen: bool) -> None:
        """Let it stand still with its connections open, or go on."""
        postmaster = int((self.folder / "data" / "postmaster.pid").read_text(encoding="utf-8").split()[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text(encoding="utf-8").split()
        for pid in (postmaster, *map(int, children)):
            os.kill(pid, signal.SIGSTOP if frozen else signal.SIGCONT)

    def remove(self) -> None:
        """Stop it for good."""
        if self.runs():
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ctl(self) -> list[str]:
        return [str(programs() / "pg_ctl"), "-D", "data", "-s"]

    def _call(self, command: list[str]) -> None:
        done = subprocess.run(
            command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, timeout=90, check=False, **_as_somebody(),
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
