"""From samples to tokens: the same for training, for scores and for every other question to the model."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from budgetsearch.core.codec import read_json
from budgetsearch.core.errors import ModelError
from budgetsearch.training.data.conversation import Conversation, Sample, Skip, Text
from budgetsearch.training.data.messages import check_characters
from budgetsearch.training.data.reader import Reader, decoded
from budgetsearch.training.data.spans import rendered
from budgetsearch.training.data.templates import Options, Template
from budgetsearch.training.data.windows import windows

SPLIT = "longer than --max-length: split into several rows, of which the later ones begin at a later turn"


@dataclass(frozen=True)
class Encoded:
    """A row as the model sees it."""

    ids: list[int]
    trained: list[int]
    """1 for each token to learn, 0 for each that is context."""
    cut: int = 0
    """Tokens that did not fit."""


class Asks(Protocol):
    """Whatever makes a prompt of a sample, here or in a process of its own."""

    def prompt(self, sample: Sample) -> list[int]:
        """The ids that the last answer of a sample follows; raises ``Skip`` where it cannot be asked for."""


class Encoder:
    """Makes tokens of samples."""

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
        """The rows of a sample: one, or more where it is longer than a row.

        Raises:
            Skip: the sample cannot be used.
        """
        try:
            if isinstance(sample.body, Text):
                return self._texts(sample.body.text)
            talk = sample.body
            if self.template.options.train_on == "last":
                talk = talk.last_alone()
            return self._rows(talk)
        except Skip as skip:
            raise Skip(skip.reason, sample.place) from None

    def _rows(self, talk: Conversation) -> list[Encoded]:
        """One row; several, where later answers would not be in it."""
        whole = self._whole(talk)
        if self.max_length is None or len(talk.trained()) < 2 or _length(whole) <= self.max_length:
            return [fit(*whole, self.max_length)]
        most, before = self.max_length, Counter(self.template.notes)
        try:
            parts = list(windows(talk, lambda part, share: _length(self._whole(part)) <= share * most))
            found = [fit(*self._whole(part), most) for part in parts]
        except Skip:  # the template does not take a part of it
            found = [fit(*whole, most)]
        self.template.notes = before
        if len(found) > 1:
            self.template.notes[SPLIT] += 1
        return found

    def _whole(self, talk: Conversation) -> tuple[list[int], list[int]]:
        """Ids of a conversation, and which of them are learned."""
        found = rendered(self.template, talk)
        ids, trained = self._flagged(found.text, found.spans)
        if not any(trained[1:]):
            raise Skip("no token of it is trained")
        return ids, trained

    def prompt(self, sample: Sample) -> list[int]:
        """The ids that the last answer of a sample follows, as training saw them.

        Raises:
            Skip: the sample cannot be used.
        """
        body = sample.until_answer().body
        if isinstance(body, Text):
            raise Skip("a text asks nothing", sample.place)
        found = rendered(self.template, body)
        ids, behind = self._flagged(found.text, [(found.asked, found.spans[-1][1])])
        return ids[: behind.index(1)]

    def facts(self) -> dict[str, Any]:
        """What those must know that ask and read without a template, as JSON values."""
        lead = self.template.known.leads[0].strip()
        stays = bool(lead) and not self.template.own and bool(self.template.marks.search(lead))
        used = self.template.used()
        return {"stops": self.stops, "lead": lead if stays else "", "chat_template": used}

    @property
    def reader(self) -> Reader:
        """What makes text of its answers."""
        return Reader.of(self.tokenizer, self.facts())

    # ---------------------------------------------------------------------------- tokens

    def _texts(self, text: str) -> list[Encoded]:
        check_characters(text)
        begin, end, eos = self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.eos_token_id
        # A text may be a conversation that a template has written: its own tokens must not be there twice.
        begun, ended = bool(begin) and text.startswith(begin), bool(end) and text.rstrip().endswith(end)
        ids = list(self.tokenizer(text, add_special_tokens=not begun, verbose=False)["input_ids"])
        if eos is not None and not ended and ids[-1:] != [eos]:
            ids.append(eos)
        if len(ids) < 2:
            raise Skip("no token of it is trained")
        length = self.max_length or len(ids)
        # The last token of one piece begins the next: what nothing comes before is not learned.
        starts = range(0, len(ids) - 1, max(1, length - 1))
        pieces = [ids[start : start + length] for start in starts]
        return [Encoded(piece, [0] + [1] * (len(piece) - 1)) for piece in pieces]

    def _flagged(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Ids of a text, and 1 for each of them that overlaps a span; the spans are in order."""
        check_characters(text)
        # A row above the model's length is cut later, no need to warn.
        found = self.tokenizer(text, add_special_tokens=False, verbose=False)
        ids = list(found["input_ids"])
        places = list(found.encodings[0].offsets) if found.encodings else []
        starts = [start for start, _ in places]
        if len(places) != len(ids) or starts != sorted(starts):
            places = self._places(text, ids)
        return ids, flags(places, spans)

    def _places(self, text: str, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Where each token stands, by decoding: for tokenizers that do not tell.

        A token of a part of a character has the place of the whole character.
        """
        places: list[tuple[int, int]] = []
        at, pending = 0, 0
        for index, token in enumerate(self.tokenizer.convert_ids_to_tokens(list(ids))):
            piece = decoded(self.tokenizer, ids[index - pending : index + 1])
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


def questions(encoder: Asks, samples: Iterable[Sample]) -> Iterator[tuple[Sample, list[int]]]:
    """The samples whose last answer can be asked for and compared, and the ids to ask with: no plain texts,
    and no answer that is a call alone."""
    for sample in samples:
        if (ids := prompt_of(encoder, sample)) is not None:
            yield sample, ids


def prompt_of(encoder: Asks, sample: Sample) -> list[int] | None:
    """What asks for the last answer of a sample; nothing where that cannot be asked for or compared."""
    if not sample.asked or not sample.answer.strip():
        return None
    try:
        return encoder.prompt(sample)
    except Skip:
        return None


def _length(whole: tuple[list[int], list[int]]) -> int:
    """Tokens up to the last that is learned."""
    trained = whole[1]
    return len(trained) - trained[::-1].index(1)


def flags(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token that overlaps a span; both in order."""
    starts, ends = [start for start, _ in places], [end for _, end in places]
    ends = ends if ends == sorted(ends) else list(itertools.accumulate(ends, max))
    found = [0] * len(places)
    for start, end in spans:
        first, behind = bisect.bisect_right(ends, start), bisect.bisect_left(starts, end)
        found[first:behind] = [1] * max(0, behind - first)
    return found


def fit(ids: list[int], trained: list[int], max_length: int | None) -> Encoded:
    """Cut a row to ``max_length`` tokens.

    What follows the last trained token goes first. If what comes before the first answer leaves a quarter
    of the room, the end goes, an end of turn with it: the model must not learn to stop there. Else the
    beginning goes, and a quarter is kept of it where the answer is long as well.
    """
    stop = _length((ids, trained))
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
