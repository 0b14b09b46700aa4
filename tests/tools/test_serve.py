"""The server: asked by the clients that its users have, while others ask and hang up."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving.load import figures, load
from budgetsearch import api
from budgetsearch.core.errors import RunFolderError, UsageError
from budgetsearch.training.adapters import worn
from budgetsearch.training.bases import load_base
from budgetsearch.training.data.conversation import Conversation, Sample, Turn
from budgetsearch.training.data.encoder import Encoder
from budgetsearch.training.data.templates import Options
from budgetsearch.training.data.tokenizer import load_tokenizer
from tests.support.command_line import invoke
from tests.support.comparable import score, write_run
from tests.support.local_tasks import write_choice_task, write_open_task
from tests.support.serving import Running, running
from tests.support.winners import make_winner

ASKED = [{"role": "user", "content": "Say red 3 times"}]
SYSTEM = "Be brief."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path) -> Path:
    """A finished run that trained with a system text of its own."""
    place = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUDGETSEARCH_CACHE", str(place / "cache"))
        return make_winner(place / "colours", tiny_model, rows_file, system=SYSTEM)


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Running]:
    """One server for all of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUDGETSEARCH_CACHE", str(run.parent / "cache"))
        with running(run, rows=4, queue=64) as found:
            yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    """OpenAI's own."""
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def model(run: Path, tiny_model: Path) -> Any:
    """The same adapter on the same base, by the libraries alone."""
    return worn(load_base(str(tiny_model), "fp32", "cpu"), run / "adapter")


def greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    """The likeliest continuation, one full pass a token."""
    found = list(ids)
    with torch.no_grad():
        for _ in range(tokens):
            found.append(int(model(input_ids=torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


# ------------------------------------------------------------------------ OpenAI's client


def test_a_chat_is_asked_as_training_asked(client: Any, model: Any, tiny_model: Path, run: Path) -> None:
    """Behind the prompt that training saw, its system text included, comes what the libraries would say."""
    encoder = Encoder(load_tokenizer(tiny_model), Options(system=SYSTEM))
    turns = (Turn("user", ASKED[0]["content"]), Turn("assistant", "x"))
    prompt = encoder.prompt(Sample(Conversation(turns)))
    assert SYSTEM in encoder.tokenizer.decode(prompt)
    expected = greedy(model, prompt, 12)
    assert ["colours"] == [one.id for one in client.models.list()]
    found = client.chat.completions.create(
        model="colours", messages=ASKED, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = found.choices
    assert encoder.tokenizer.decode(expected, skip_special_tokens=True) == choice.message.content
    assert ("length", 12, len(prompt)) == (
        choice.finish_reason,
        found.usage.completion_tokens,
        found.usage.prompt_tokens,
    )
    for token in choice.logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob


def test_a_stream_says_the_same_and_seeds_repeat(client: Any) -> None:
    """Piece by piece, with the usage at its end; another seed says something else; two of n differ."""
    how = {"model": "colours", "messages": ASKED, "max_tokens": 16, "temperature": 1.0}
    whole = client.chat.completions.create(**how, seed=3)
    again = client.chat.completions.create(**how, seed=3)
    other = client.chat.completions.create(**how, seed=4, n=2)
    parts = list(
        client.chat.completions.create(**how, seed=3, stream=True, stream_options={"include_usage": True})
    )
    said = whole.choices[0].message.content
    assert said == again.choices[0].message.content
    assert said == "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert whole.usage == parts[-1].usage
    assert 3 == len({said, *(choice.message.content for choice in other.choices)})


def test_completions_tell_logprobs_of_prompt_and_answer(client: Any, model: Any, tiny_model: Path) -> None:
    """As the libraries compute them; the first token has none; offsets are where tokens stand in the text."""
    found = client.completions.create(
        model="colours", prompt="Say red", max_tokens=5, temperature=0, logprobs=1, echo=True
    )
    (choice,) = found.choices
    ids = load_tokenizer(tiny_model)("Say red")["input_ids"]
    every = ids + greedy(model, ids, 5)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([every])).logits[0], dim=-1)
    expected = [float(logprobs[place, token]) for place, token in enumerate(every[1:])]
    assert choice.logprobs.token_logprobs[0] is None
    torch.testing.assert_close(
        torch.tensor(choice.logprobs.token_logprobs[1:]), torch.tensor(expected), atol=1e-3, rtol=1e-3
    )
    assert choice.text.startswith("Say red")
    assert list(range(8)) == choice.logprobs.text_offset[:8]
    batch = client.completions.create(model="colours", prompt=["Say red", "Say"], max_tokens=0, echo=True)
    assert ["Say red", "Say"] == [one.text for one in batch.choices]


def test_stop_sequences_end_answers_across_tokens(client: Any, server: Running) -> None:
    """A token is a byte here, so each stop lies across several: whole, as a stream, and for the challenge."""
    how = {"model": "colours", "prompt": "Say blue", "temperature": 1.0, "seed": 11}
    full = client.completions.create(**how, max_tokens=60).choices[0].text
    stop = full[20:23]
    before = full[: full.index(stop)]
    ended = client.completions.create(**how, max_tokens=60, stop=[stop], logprobs=0).choices[0]
    assert (before, "stop") == (ended.text, ended.finish_reason)
    assert all(offset < len(before) for offset in ended.logprobs.text_offset)
    parts = client.completions.create(**how, max_tokens=60, stop=stop, stream=True)
    assert before == "".join(part.choices[0].text for part in parts)
    _, found = server.post(
        "/process", prompt="Say blue", max_new_tokens=60, temperature=1.0, top_k=0, seed=11,
        stop_sequences=[stop],
    )  # fmt: skip
    assert before == found["text"]


def test_what_cannot_be_answered_is_refused_by_its_name(server: Running, client: Any) -> None:
    """Too long, another model, a field that means nothing here, a chat that asks nothing: 400 or 404."""
    import openai

    how = {"model": "colours", "prompt": "x"}
    with pytest.raises(openai.BadRequestError, match=r"holds 2048 tokens, and this asks for 5001"):
        client.completions.create(**how, max_tokens=5000)
    with pytest.raises(openai.NotFoundError, match="called 'colours'"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.completions.create(**how, logit_bias={"5": 1})
    with pytest.raises(openai.BadRequestError, match="last one must be"):
        client.chat.completions.create(model="colours", messages=[{"role": "assistant", "content": "x"}])
    status, found = server.post("/process", prompt="x", max_new_tokens=5000)
    assert (400, True) == (status, "Shorten one of them" in found["detail"])
    assert 400 == server.post("/process", prompt="")[0]
    assert 400 == server.get("/health", Host="evil.example")[0]


# ----------------------------------------------------------------------------- challenge


def test_the_challenges_harness_gets_what_it_reads(server: Running) -> None:
    """Each field that it reads, of the type that it wants, for a request as it sends it."""
    asked = {
        "prompt": "Say red", "temperature": 1e-07, "num_return_sequences": 1, "max_new_tokens": 6, "top_p": 1,
        "echo_prompt": True, "top_k_per_token": 3, "stop_sequences": ["\n"],
    }  # fmt: skip
    status, found = server.post("/process", **asked)
    assert (200, {"text", "tokens", "logprob", "request_time"}) == (status, set(found))
    assert found["text"].startswith("Say red")
    assert list("Say red") == [token["text"] for token in found["tokens"][:7]]
    for token in found["tokens"][1:]:
        assert {"text", "logprob", "top_logprob"} == set(token)
        assert all(isinstance(value, float) for value in token["top_logprob"].values())
    assert pytest.approx(found["logprob"]) == sum(token["logprob"] for token in found["tokens"])
    alone = server.post("/process", **{**asked, "echo_prompt": False})[1]
    assert found["text"] == "Say red" + alone["text"]
    looked = server.post("/process", prompt="Say red", max_new_tokens=0, echo_prompt=True)[1]
    assert ("Say red", 7) == (looked["text"], len(looked["tokens"]))


def test_its_defaults_sample_and_its_seeds_repeat(server: Running) -> None:
    """The likeliest of several samples is told; tokens come from text and become text again."""
    first, second = (server.post("/process", prompt="Say", seed=7)[1]["text"] for _ in range(2))
    other = server.post("/process", prompt="Say", seed=8)[1]["text"]
    assert first == second != other
    many = server.post("/process", prompt="Say", seed=7, num_samples=4, max_new_tokens=8)[1]["logprob"]
    each = [
        server.post("/process", prompt="Say", seed=7 + i, max_new_tokens=8)[1]["logprob"] for i in range(4)
    ]
    assert pytest.approx(max(each), rel=1e-4) == many
    tokens = server.post("/tokenize", text="Say red", truncation=True, max_length=3)[1]["tokens"]
    assert "Say" == server.post("/decode", tokens=tokens)[1]["text"]


# -------------------------------------------------------------------------------- lm-eval


@pytest.mark.slow
def test_lm_eval_scores_the_server_as_it_scores_the_model(
    server: Running, model: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choices by their likelihood and open answers, over both of OpenAI's routes: example by example."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "definitions"
    write_choice_task(folder)
    write_open_task(folder)
    tokenizer = load_tokenizer(run / "adapter")
    tasks = TaskManager(include_path=str(folder), include_defaults=False)

    def graded(lm: Any, task: str, **how: Any) -> Any:
        found = simple_evaluate(
            model=lm, tasks=[task], limit=4, task_manager=tasks,
            bootstrap_iters=0, log_samples=True, **how,
        )  # fmt: skip
        samples = sorted(found["samples"][task], key=lambda one: one["doc_id"])
        return [(one["doc_id"], one["filtered_resps"]) for one in samples], found["results"][task]

    direct = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    address = {"model": "colours", "tokenizer": str(run / "adapter"), "tokenizer_backend": "huggingface"}
    ours = {
        "model_args": {
            **address,
            "base_url": f"{server.url}/v1/completions",
            "num_concurrent": 2,
            "max_retries": 1,
        }
    }
    chat = {"model_args": {**address, "base_url": f"{server.url}/v1/chat/completions", "max_retries": 1}}
    expected, scores = graded(direct, "choices_local")
    found, same = graded("local-completions", "choices_local", **ours)
    assert scores["acc,none"] == same["acc,none"]
    for (_, one), (_, other) in zip(expected, found, strict=True):
        assert [pytest.approx(float(a[0]), abs=1e-3) for a in one] == [float(b[0]) for b in other]
        assert [str(a[1]) for a in one] == [str(b[1]) for b in other]
    assert graded(direct, "open_local")[0] == graded("local-completions", "open_local", **ours)[0]
    asked = {"apply_chat_template": True}
    expected = graded(direct, "open_local", **asked)[0]
    assert expected == graded("local-chat-completions", "open_local", **chat, **asked)[0]


# ----------------------------------------------------------------------------- many users


def test_many_ask_at_once_and_one_hangs_up(server: Running) -> None:
    """Sixteen clients get what each of them gets alone; what nobody waits for any more is cancelled."""

    def one(number: int) -> str:
        body = {"prompt": f"Say {number}", "max_new_tokens": 10, "seed": number, "top_k": 0}
        return str(server.post("/process", **body)[1]["text"])

    alone = [one(number) for number in range(16)]
    before = _metric(server, "cancelled")
    with ThreadPoolExecutor(17) as pool:
        left = pool.submit(_hang_up, server)
        assert alone == list(pool.map(one, range(16)))
        left.result()
    deadline = time.monotonic() + 20
    while _metric(server, "cancelled") <= before:
        assert time.monotonic() < deadline, "nobody noticed that the client is gone"
        time.sleep(0.05)
    assert (200, 0) == (server.get("/health")[0], server.get("/health")[1]["active"])
    assert 'budgetsearch_requests_total{path="/process",status="200"}' in server.get("/metrics")[1]


def _hang_up(server: Running) -> None:
    """Ask for a long answer and go."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = json.dumps({"prompt": "Say", "max_new_tokens": 1900, "seed": 1})
    connection.request("POST", "/process", body, {"Content-Type": "application/json"})
    time.sleep(0.2)
    connection.close()


def _metric(server: Running, name: str) -> float:
    lines = server.get("/metrics")[1].splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"budgetsearch_{name} ")))


def test_a_full_queue_says_so_and_a_stop_writes_what_was_taken_on(
    run: Path, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """429 with when to come again; who was taken on gets all of the answer, then the port is free."""
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(run.parent / "cache"))
    asked = {"prompt": "Say", "max_new_tokens": 400, "seed": 1, "top_k": 0}
    expected = server.post("/process", **asked)[1]["text"]
    assert len(expected) > 60
    with running(run / "adapter", rows=1, queue=0) as small, ThreadPoolExecutor(2) as pool:
        long = pool.submit(small.post, "/process", **asked)
        while small.get("/health")[1]["active"] == 0:
            time.sleep(0.01)
        status, found = small.post("/v1/completions", model="colours", prompt="x")
        assert (429, "rate_limit_exceeded") == (status, found["error"]["code"])
        small.server.should_exit = True
        status, found = long.result(60)
        assert (200, expected) == (status, found["text"])
        small.thread.join(30)
        with socket.create_server(("127.0.0.1", small.port)):
            pass


@pytest.mark.slow
def test_a_minute_of_sixteen_clients_has_no_error(server: Running) -> None:
    """Each asks anew as soon as it was answered; the latency is printed."""
    found = figures(load(server.url, 16, 60.0), 16, 60.0)
    print(json.dumps(found))
    assert ["200"] == list(found["statuses"])
    assert found["latency"]["median"] <= found["latency"]["p99"] <= found["latency"]["longest"]
    assert (200, 0) == (server.get("/health")[0], server.get("/health")[1]["active"])


@pytest.mark.slow
def test_a_process_that_is_told_to_stop_writes_what_it_took_on(run: Path, server: Running) -> None:
    """SIGTERM while an answer is being written: its client gets all of it, nobody else is taken on, and the
    exit code is 0."""
    asked = {"prompt": "Say", "max_new_tokens": 400, "seed": 1, "top_k": 0}
    expected = server.post("/process", **asked)[1]["text"]
    command = [sys.executable, "-m", "budgetsearch", "serve", str(run), "--port", "0", "--gpu", "cpu"]
    process = subprocess.Popen(command, cwd=run.parent, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "answers on" in line)
        own = Running(None, threading.current_thread(), int(line.rsplit(":", 1)[1]))
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(own.post, "/process", **asked)
            while own.get("/health")[1]["active"] == 0:
                time.sleep(0.01)
            process.terminate()
            status, found = long.result(60)
        assert (200, expected) == (status, found["text"])
        _, said = process.communicate(timeout=60)
        assert (0, True) == (process.returncode, "every answer that was taken on is written" in said)
        with pytest.raises(urllib.error.URLError):
            own.get("/health")
    finally:
        process.kill()
        process.communicate()


# ------------------------------------------------------------------------------ bad input


def test_a_port_in_use_and_an_unfinished_run_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, before anything is loaded."""
    monkeypatch.setenv("BUDGETSEARCH_CACHE", str(run.parent / "cache"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text = invoke("serve", str(run), "--port", str(port), "--gpu", "cpu")
    assert (2, True) == (code, f"Port {port} cannot be used" in text)
    with pytest.raises(RunFolderError, match="is not finished"):
        api.serve(write_run(tmp_path / "run", score(), finished=False))


def test_without_the_extra_it_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install."""
    import sys

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UsageError, match=r"pip install 'budgetsearch\[serve\]'"):
        api.serve(run)
