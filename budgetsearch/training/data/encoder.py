"""From samples to tokens: the same for training, for scores and for every other question to the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import ModelError
from budgetsearch.training.data.conversation import Sample, Skip, Text
from budgetsearch.training.data.shapes import check_characters
from budgetsearch.training.data.spans import rendered
from budgetsearch.training.data.templates import Options, Template


@dataclass(frozen=True)
class Encoded:
    """A row as the model sees it."""

    ids: list[int]
    trained: list[int]
    """1 for each token to learn, 0 for each that is context."""
    cut: int = 0
    """Tokens that did not fit."""


class Encoder:
    """Makes tokens of samples, and text of what the model answers."""

    def __init__(self, tokenizer: Any, options: Options | None = None, max_length: int | None = None) -> None:
        """``max_length`` in tokens; None: rows are not cut.

        Raises:
            DataError: the chat template cannot be used.
        """
        self.template = Template(tokenizer, options or Options())
        self.tokenizer, self.max_length = self.template.tokenizer, max_length

    @property
    def notes(self) -> dict[str, int]:
        """What was done to rows beside rendering them, and to how many."""
        return dict(self.template.notes)

    @property
    def stops(self) -> list[int]:
        """The tokens that end an answer, the trained end of turn first."""
        ids = [self.tokenizer.convert_tokens_to_ids(token) for token in self._ends()]
        return list(dict.fromkeys(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None))

    def _ends(self) -> list[str]:
        known, marks = self.template.known, self.template.marks
        # What also ends a thought must not stop an answer short.
        between = "".join(known.leads)
        ends = [known.stop, *sorted(known.ends), known.follows]
        return [end for end in ends if marks.fullmatch(end) and (end == known.stop or end not in between)]

    def encode(self, sample: Sample) -> list[Encoded]:
        """The rows of a sample: one of a conversation, one or more of a text.

        Raises:
            Skip: the sample cannot be used.
        """
        try:
            if isinstance(sample.body, Text):
                return self._texts(sample.body.text)
            talk = sample.body
            if self.template.options.train_on == "last":
                talk = talk.last_alone()
            found = rendered(self.template, talk)
        except Skip as skip:
            raise Skip(skip.reason, sample.place) from None
        ids, places = self._tokens(found.text)
        trained = flags(places, found.spans)
        if not any(trained[1:]):
            raise Skip("no token of it is trained", sample.place)
        return [fit(ids, trained, self.max_length)]

    def prompt(self, sample: Sample) -> list[int]:
        """The ids that the last answer of a sample follows, as training saw them.

        Raises:
            Skip: the sample cannot be used.
        """
        body = sample.until_answer().body
        if isinstance(body, Text):
            raise Skip("a text asks nothing", sample.place)
        found = rendered(self.template, body)
        ids, places = self._tokens(found.text)
        behind = flags(places, [(found.asked, found.spans[-1][1])])
        return ids[: behind.index(1)]

    def answer(self, ids: Sequence[int]) -> str:
        """What the model says: up to its end of turn, without reasoning and without the template's words."""
        ends = {*self.stops}
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        text = self._decoded(ids[:stop])
        lead = self.template.known.leads[0].strip()
        if lead and not self.template.own and self.template.marks.search(lead):
            text = text.rpartition(lead)[2]
        text = text.rpartition("</think>")[2]
        return self.template.marks.sub("", text).strip()

    # ---------------------------------------------------------------------------- tokens

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _texts(self, text: str) -> list[Encoded]:
        check_characters(text)
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        if len(ids) < 2:
            raise Skip("no token of it is trained")
        length = self.max_length or len(ids)
        # The last token of one piece begins the next: what nothing comes before is not learned.
        starts = range(0, len(ids) - 1, max(1, length - 1))
        pieces = [ids[start : start + length] for start in starts]
        return [Encoded(piece, [0] + [1] * (len(piece) - 1)) for piece in pieces]

    def _tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and the characters of each."""
        check_characters(text)
        fast = getattr(self.tokenizer, "is_fast", False)
        # A row above the model's length is cut later, no need to warn.
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        ids = list(found["input_ids"])
        if fast:
            places = [(int(a), int(b)) for a, b in found["offset_mapping"]]
            if all(a <= c for (a, _), (c, _) in pairwise(places)):
                return ids, places
        return ids, self._places(text, ids)

    def _places(self, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Where each token stands, by decoding: for tokenizers that do not tell.

        A token of a part of a character has the place of the whole character.
        """
        places: list[tuple[int, int]] = []
        at, pending = 0, 0
        for index, token in enumerate(self.tokenizer.convert_ids_to_tokens(list(ids))):
            piece = self._decoded(ids[index - pending : index + 1])
            spaced = str(token).replace("\u2581", " ")
            # Alone a token may lose the space in front of it, and the first one of a text may gain one.
            fitting = (p for p in (piece, f" {piece}", spaced, spaced[1:]) if p and text.startswith(p, at))
            found = next(fitting, None)
            if found is None:
                pending += 1
                continue
            places += [(at, at + len(found))] * (pending + 1)
            at, pending = at + len(found), 0
        if pending or at != len(text):
            raise Skip("the tokenizer does not say which of its tokens are which characters")
        return places


def questions(encoder: Encoder, samples: Iterable[Sample]) -> Iterator[tuple[Sample, list[int]]]:
    """The samples whose last answer can be asked for and compared, and the ids to ask with: no plain texts,
    and no answer that is a call alone."""
    for sample in samples:
        if sample.asked and sample.answer.strip():
            try:
                yield sample, encoder.prompt(sample)
            except Skip:
                continue


def flags(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token that overlaps a span; both in order."""
    found, index = [], 0
    for start, end in places:
        while index < len(spans) and start >= spans[index][1]:
            index += 1
        found.append(int(index < len(spans) and end > spans[index][0]))
    return found


def fit(ids: list[int], trained: list[int], max_length: int | None) -> Encoded:
    """Cut a row to ``max_length`` tokens.

    What follows the last trained token goes first. If what comes before the first answer leaves a quarter
    of the room, the end goes, an end of turn with it: the model must not learn to stop there. Else the
    beginning goes, and a quarter is kept of it where the answer is long as well.
    """
    stop = len(trained) - trained[::-1].index(1)
    if max_length is None or stop <= max_length:
        kept = len(ids) if max_length is None else min(len(ids), max_length)
        return Encoded(ids[:kept], trained[:kept])
    first, quarter = trained.index(1, 1), max_length // 4
    if first <= max_length - quarter:
        start, stop = 0, max_length
    else:
        end = next((i for i in range(first, stop) if not trained[i]), stop)
        stop = max(max_length, min(end, first + max_length - quarter))
        start = stop - max_length
    return Encoded(ids[start:stop], trained[start:stop], len(ids) - (stop - start))


def check_vocabulary(tokenizer: Any, model_path: Path) -> None:
    """Refuse a tokenizer that has more tokens than the model has embeddings.

    Raises:
        ModelError: it has.
    """
    try:
        config = read_json((model_path / "config.json").read_bytes())
        rows = config.get("vocab_size") or config["text_config"]["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # whoever loads the model says what is wrong with it
    if isinstance(rows, int) and len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer knows {len(tokenizer)} tokens and the model's embeddings have {rows} rows, so "
            "some tokens mean nothing to the model. Resize its embeddings (resize_token_embeddings) and save "
            "it, or use the tokenizer that it was made with."
        )
