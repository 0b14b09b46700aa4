"""The engine behind the server: text as it comes, and sequences that join, leave and outlive errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from budgetsearch.training.inference.draw import chosen, draw
from budgetsearch.training.inference.engine import JOIN_TOKENS, Busy, Closing, Engine
from budgetsearch.training.inference.sequence import Answer, Sampling
from budgetsearch.training.inference.text import Pieces, Writer
from tests.support.tiny import tiny_tokenizer

PIECES = Pieces(tiny_tokenizer())
END = 257


def ids(text: str) -> list[int]:
    """One token per byte."""
    return list(PIECES._tokenizer(text, add_special_tokens=False)["input_ids"])


def answer(prompt: str = "a", tokens: int = 100, **how: Any) -> Answer:
    """An answer to be written."""
    return Answer(ids(prompt), Sampling(tokens, **how), PIECES, [END])


def test_text_waits_for_whole_characters_and_for_what_may_become_a_stop() -> None:
    """Half an é is not shown; of a stop sequence across tokens nothing is, and what only began like it is."""
    writer = Writer(PIECES, ids("a"), ["END", "stop it"])
    shown = []
    for token in ids("é EN st stop it"):
        writer.add(token)
        shown.append(writer.text[: writer.shown])
    assert ["", "é", "é ", "é ", "é ", "é EN ", "é EN "] == shown[:7]
    assert "é EN st " == shown[-1]
    assert writer.stopped
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


def test_what_never_becomes_a_character_does_not_hold_up_the_rest() -> None:
    """Odd bytes are as many signs of replacement, text goes on behind them, and a character that begins among
    them is one."""
    first, second = ids("é")
    tokens = [second] * 5 + [first, second] + ids("ok") + [first]
    writer = Writer(PIECES, ids("a"), ["x"])
    for token in tokens:
        writer.add(token)
    assert writer.text == 5 * "\ufffd" + "éok"
    writer.close()
    assert PIECES.text(tokens) == writer.text


def test_an_answer_ends_at_its_end_its_stop_or_its_length() -> None:
    """Neither the end nor the stop sequence is in it, nor are tokens that were only of the stop."""
    ended, stopped, full = answer(), answer(stop=("lo w",)), answer(tokens=3)
    for one in (ended, stopped, full):
        for token in [*ids("hello world"), END]:
            if not one.finish:
                one.take(token, -1.0, ())
    found = [(one.writer.text, one.finish, len(one.tokens)) for one in (ended, stopped, full)]
    assert [("hello world", "stop", 11), ("hel", "stop", 3), ("hel", "length", 3)] == found


def test_tokens_are_drawn_from_what_temperature_and_cuts_leave() -> None:
    """The same seed draws the same; the share of a token is its probability; cuts leave out the others."""
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    one, other = answer(seed=5), answer(seed=5)
    assert [chosen(logits, one) for _ in range(50)] == [chosen(logits, other) for _ in range(50)]
    many = answer(seed=1)
    counts = torch.bincount(torch.tensor([chosen(logits, many) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(counts, logits.exp(), atol=0.03, rtol=0)
    for how, kept in (({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0, 1}), ({"temperature": 0.0}, {0})):
        cut = answer(seed=2, **how)
        assert kept == {chosen(logits, cut) for _ in range(60)}
    tired = answer(frequency=2.0, temperature=0.0)
    tired.take(0, -1.0, ())
    assert 1 == chosen(logits, tired)


def test_logprobs_are_the_models_own_whatever_the_temperature() -> None:
    """Before temperature and cuts; the likeliest come first."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    one = answer(seed=5, temperature=0.1, top_k=1, candidates=2)
    draw(logits, [one])
    (token,) = one.tokens
    assert (0, pytest.approx(-0.693, abs=1e-3)) == (token.id, token.logprob)
    assert [0, 1] == [candidate for candidate, _ in token.candidates]


class Script:
    """A batch that writes the letter b, one a step, as long as it is let; it can be held up and fail."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.seen: list[int] = []
        self.trouble: list[Exception] = []

    def look(self, answers: Sequence[Answer]) -> None:
        raise AssertionError("nobody asked for it")

    def write(self, answers: Sequence[Answer], pause: Callable[[], bool]) -> None:
        self.seen.append(len(answers))
        if self.trouble:
            raise self.trouble.pop(0)
        while not all(one.finish for one in answers):
            assert self.go.wait(20)
            for one in answers:
                if one.cancelled and not one.finish:
                    one.end("cancelled")
                elif not one.finish:
                    one.take(ids("b")[0], -1.0, ())
            if pause():
                return


def told(tokens: int, over: threading.Semaphore) -> Answer:
    """An answer that says when it is over."""
    return Answer(
        ids("a"), Sampling(tokens), PIECES, [END], tell=lambda one: over.release() if one.finish else None
    )


@pytest.fixture
def script() -> Script:
    """The batch of the engine under test."""
    return Script()


def finished(over: threading.Semaphore, count: int) -> None:
    """Wait for so many answers."""
    assert all(over.acquire(timeout=20) for _ in range(count))


def test_who_waits_joins_the_batch_under_way(script: Script) -> None:
    """A short answer does not wait for a long one's end: it joins at the next border, and both are whole."""
    engine, over = Engine(script, "cpu", rows=2), threading.Semaphore(0)
    long, short = told(20 * JOIN_TOKENS, over), told(3, over)
    script.go.clear()
    engine.start()
    engine.submit([long])
    engine.submit([short])
    script.go.set()
    finished(over, 2)
    assert (20 * JOIN_TOKENS, 3) == (len(long.tokens), len(short.tokens))
    engine.close(10)
    assert engine.counts.answers == 2
    assert script.seen in ([1, 2, 1], [2, 1], [1, 2], [2])


def test_a_full_queue_refuses_and_a_closing_engine_drains(script: Script) -> None:
    """What was taken on is written; what does not fit is refused whole; then nothing is taken any more."""
    engine, over = Engine(script, "cpu", rows=1, most_waiting=2), threading.Semaphore(0)
    script.go.clear()
    engine.start()
    engine.submit([told(5, over)])
    while engine.active == 0:
        pass
    engine.submit([told(5, over), told(5, over)])
    with pytest.raises(Busy, match=r"2 answers wait already.*queue of 2"):
        engine.submit([told(5, over)])
    closing = threading.Thread(target=engine.close, args=(20,))
    closing.start()
    while engine.is_alive:
        pass
    with pytest.raises(Closing):
        engine.submit([told(5, over)])
    script.go.set()
    finished(over, 3)
    closing.join(20)
    assert engine.counts.answers == 3


def test_a_cancelled_answer_frees_its_place(script: Script) -> None:
    """Under way or waiting: it ends as cancelled, and the next one is written."""
    engine, over = Engine(script, "cpu", rows=1), threading.Semaphore(0)
    gone, waiting, stays = told(10**6, over), told(10**6, over), told(2, over)
    engine.submit([gone, waiting, stays])
    gone.cancelled = waiting.cancelled = True
    engine.start()
    finished(over, 3)
    assert ["cancelled", "cancelled", "length"] == [one.finish for one in (gone, waiting, stays)]
    engine.close(10)
    assert 2 == engine.counts.cancelled


def test_out_of_memory_is_survived_with_fewer_at_once(script: Script) -> None:
    """Half of them go back to the queue, and all are whole in the end."""
    engine, over = Engine(script, "cpu", rows=4), threading.Semaphore(0)
    script.trouble = [torch.OutOfMemoryError("CUDA out of memory")]
    engine.submit([told(4, over) for _ in range(4)])
    engine.start()
    finished(over, 4)
    engine.close(10)
    assert (2, [4, 2, 2], 0) == (engine.rows, script.seen, engine.counts.failed)


def test_a_batch_that_fails_takes_nobody_else_with_it(script: Script) -> None:
    """Its answers say what happened; the next one is written."""
    engine, over = Engine(script, "cpu"), threading.Semaphore(0)
    script.trouble = [ArithmeticError("no numbers")]
    broken, fine = told(4, over), told(4, over)
    engine.submit([broken])
    engine.start()
    finished(over, 1)
    engine.submit([fine])
    finished(over, 1)
    engine.close(10)
    assert ("error", "ArithmeticError: no numbers", "length") == (broken.finish, broken.failure, fine.finish)
