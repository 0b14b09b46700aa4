"""The process that renders and tokenizes for whoever asks questions beside a run, see ``apart``.

The first line of its input says with which model; each further one is a request, and each line of its output
an answer, both in JSON. It ends when its input does, whatever it is at.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import UsageError
from budgetsearch.training.data.conversation import Skip, from_json
from budgetsearch.training.data.encoder import Encoder
from budgetsearch.training.data.templates import Options
from budgetsearch.training.data.tokenizer import load_tokenizer

MODULE = "budgetsearch.training.data.encoding"
MOST_REPLY = 64 << 20
"""Bytes of an answer: what is longer is no prompt, and whoever asked would have to hold it."""


def reply(encoder: Encoder, request: Mapping[str, Any]) -> Any:
    """What is asked for.

    Raises:
        Skip: the chat template does not take it.
    """
    match request["do"]:
        case "prompt":
            return encoder.prompt(from_json(request["sample"]))
        case "ids":
            return list(encoder.tokenizer(request["text"], verbose=False)["input_ids"])
        case "render":
            return encoder.template.render(request["chat"], prompt=request["prompt"])
        case _:
            return _as_asked(encoder, request)


def _as_asked(encoder: Encoder, request: Mapping[str, Any]) -> str:
    from jinja2.exceptions import TemplateError

    try:
        tokenizer = encoder.template.asking()
        return str(tokenizer.apply_chat_template(request["chat"], **request["how"], tokenize=False))
    except TemplateError as error:
        raise Skip(str(error)) from None


def _told(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"done": work()}
    except Skip as skip:
        return {"skip": skip.reason, "place": skip.place}
    except UsageError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "there is not enough memory for it"}
    except Exception as error:  # a template and a tokenizer are strangers' programs
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def main() -> None:
    """Answer until the input ends."""
    output = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is none of our lines

    def tell(message: Mapping[str, Any]) -> None:
        line = json.dumps(message).encode()
        if len(line) > MOST_REPLY:
            line = json.dumps({"error": f"it becomes more than {MOST_REPLY >> 20} MiB"}).encode()
        with os.fdopen(os.dup(output), "wb") as file:
            file.write(line + b"\n")

    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    task = requests.get()
    try:
        tokenizer = load_tokenizer(Path(task["model_path"]), trust_remote_code=task["trust_remote_code"])
    except UsageError as error:
        return tell({"error": str(error)})
    tell({"done": "loaded"})  # from here on a stranger's program has its time
    made: list[Encoder] = []
    tell(_told(partial(_look, made, tokenizer, task["options"])))
    while made:
        tell(_told(partial(reply, made[0], requests.get())))
    return None


def _look(made: list[Encoder], tokenizer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    made.append(Encoder(tokenizer, Options(**options)))
    return made[0].facts()


def _listen(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        requests.put(read_json(line))
    os._exit(0)


if __name__ == "__main__":
    main()
