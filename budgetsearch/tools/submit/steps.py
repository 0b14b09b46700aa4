"""The steps from the folder to an answer, and to the winner trained again: for Docker, and for a check
without it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

HOME = "/submission"
"""Where the folder lies in an image."""
CACHE = {"BUDGETSEARCH_CACHE": f"{HOME}/cache", "HF_HOME": f"{HOME}/cache/huggingface"}
REQUIREMENTS, FETCH, ADAPTER, BASE = "requirements.txt", "fetch.py", "adapter", "base"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""Once the base is there the server asks nobody for it."""
EXTRA_INDEX = "PIP_EXTRA_INDEX_URL"
TOKEN = "--mount=type=secret,id=HF_TOKEN,env=HF_TOKEN"
"""What a gated base is fetched with: it is there for one step, and in no layer of the image."""
GATED = (
    "# syntax=docker/dockerfile:1",
    "# Where the base is gated, build with:  --secret id=HF_TOKEN,env=HF_TOKEN",
)
PORT = 80
"""That of the challenge."""
KILL_SECONDS = 60
"""After the time is up a training is asked to stop, and so much later made to."""
FETCH_CODE = '''"""Fetches the base model, and insists that it is the one of training to the byte."""

from pathlib import Path

from budgetsearch.run.winner import winner_of

winner_of(Path(__file__).with_name("{adapter}")).base({source!r}, {trusted!r}, print)
'''


@dataclass(frozen=True)
class Steps:
    """What is run, one argument after the other; the folder is the working folder."""

    wheel: str
    python: str
    """The version that the run has here."""
    base: str
    """What ``--model`` names: the folder of the copied base, or where it is fetched from."""
    rows: int
    """Answers at once."""
    seconds: float
    """The budget that the run had: the winner alone takes less on the same card."""
    gpu: str
    trusted: bool = False
    """Whether code of the base may run."""
    index: str | None = None
    """Where pip looks beside PyPI."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """By role (data, valid): where the rows come from, one source a line."""

    @property
    def copied(self) -> bool:
        """Whether the base lies in the folder."""
        return self.base == BASE

    @property
    def install(self) -> Sequence[Sequence[str]]:
        """Exactly what is pinned, and nothing that pip would find for it."""
        pip = ("python", "-m", "pip")
        return (
            (*pip, "install", "--no-deps", "--requirement", REQUIREMENTS),
            (*pip, "install", "--no-deps", self.wheel),
            (*pip, "check"),
        )

    @property
    def fetch(self) -> Sequence[Sequence[str]]:
        """What brings the base, if it is not there."""
        return () if self.copied else (("python", FETCH),)

    @property
    def hub(self) -> bool:
        """Whether the base is fetched from the Hub, which may ask who wants it."""
        return not self.copied and not self.base.startswith("pypi:")

    def serve(self, host: str, port: int) -> Sequence[str]:
        """The server of the challenge's API."""
        command = ("budgetsearch", "serve", ADAPTER, "--model", self.base, "--rows", str(self.rows))
        return (*command, "--gpu", self.gpu, "--host", host, "--port", str(port), *self._trust)

    def train(self, out: str) -> Sequence[str]:
        """The winner again, from the manifest beside the adapter."""
        limit = ("timeout", "--signal=INT", f"--kill-after={KILL_SECONDS}", f"{self.seconds:.0f}")
        places = (part for role, source in self.sources.items() for part in (f"--{role}", source))
        command = ("budgetsearch", "reproduce", ADAPTER, "--model", self.base, *places)
        return (*limit, *command, "--out", out, *self._trust)

    @property
    def _trust(self) -> Sequence[str]:
        return ("--trust-remote-code",) if self.trusted else ()

    def fetch_code(self) -> str:
        """The text of ``fetch.py``."""
        return FETCH_CODE.format(adapter=ADAPTER, source=self.base, trusted=self.trusted)

    # ------------------------------------------------------------------------------ Docker

    def inference(self) -> str:
        """The Dockerfile that answers on the challenge's port."""
        return "\n".join(
            [
                *(GATED if self.hub else ()),
                "# docker build -t submission . && docker run --gpus all -p 8080:80 submission",
                *self._head(),
                *(_env(name, value) for name, value in OFFLINE.items()),
                "",
                f"EXPOSE {PORT}",
                f"CMD {json.dumps(self.serve('0.0.0.0', PORT))}",
                "",
            ]
        )

    def training(self) -> str:
        """The Dockerfile that trains the winner again and leaves it in ``/out``."""
        return "\n".join(
            [
                *(GATED if self.hub else ()),
                "# docker build -t training -f Dockerfile.train . && "
                "docker run --gpus all -v $PWD/out:/out training",
                *self._head(),
                "",
                f"# {self.seconds / 3600:g} hours, which the whole search had; it ends sooner",
                f"CMD {json.dumps(self.train('/out/adapter'))}",
                "",
            ]
        )

    def _head(self) -> list[str]:
        """What both have: the full image, for some packages are compiled, and so are kernels on a card."""
        variables = {**CACHE, "PIP_NO_CACHE_DIR": "1"}
        if self.index:
            variables[EXTRA_INDEX] = self.index
        return [
            f"FROM python:{self.python}",
            *(_env(name, value) for name, value in variables.items()),
            f"WORKDIR {HOME}",
            f"COPY {REQUIREMENTS} {self.wheel} ./",
            *(f"RUN {json.dumps(step)}" for step in self.install),
            "COPY . .",
            *(f"RUN {f'{TOKEN} ' if self.hub else ''}{json.dumps(step)}" for step in self.fetch),
        ]


def _env(name: str, value: str) -> str:
    return f"ENV {name}={value}"
