"""report.html: the answer first, one safe file, on a screen, on a phone and on paper."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from budgetsearch import api
from budgetsearch.core.errors import RunFolderError
from budgetsearch.core.events import CardWatched, Closed, Heartbeat, Opened
from budgetsearch.core.history.fold import fold
from budgetsearch.core.history.history import History
from budgetsearch.core.policy.deadline import ENDING
from budgetsearch.core.records import PHASES, Revision, Score
from budgetsearch.core.reports import Beat, CardUse
from budgetsearch.storage.ledger import Ledger, read_entries
from budgetsearch.storage.runfolder import RunFolder
from budgetsearch.views.report import numbers as numbers_module
from budgetsearch.views.report import offline
from budgetsearch.views.report import write as reporting
from budgetsearch.views.report.html import figures_of, html_text
from budgetsearch.views.report.numbers import Importance, Importances, Numbers, importance_of, numbers_of
from budgetsearch.views.report.over_time import PHASE_GROUPS
from budgetsearch.views.study.importance import importances
from tests.support.browser import Page, browser_page
from tests.support.comparable import Standing
from tests.support.factories import FACTS, Story, best_scored, params, paused, whole_run
from tests.support.simulation import make_driver

SECTIONS = [
    "The answer",
    "Where the budget went",
    "The rung ladder",
    "Loss against seconds",
    "Loss against memory",
    "Which parameters mattered",
    "Rank correlation between rungs",
    "Memory and utilization over time",
    "What failed and why",
    "All trials",
    "More",
]
VOID = {"meta", "br", "img", "link", "input", "hr", "base"}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
FIGURES = {
    "timeline",
    "ladder",
    "progress",
    "rate",
    "memory_front",
    "importance",
    "rank_agreement",
    "memory_over_time",
}


class Outline(HTMLParser):
    """Checks that every element is closed where it must be, and keeps what matters."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"{tag} has an attribute twice"
        self.attributes.append((tag, found))
        if "id" in found:
            self.ids.append(str(found["id"]))
        if tag == "h2":
            self.headings.append("")
        if tag == "script":
            self.scripts.append((found, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self.open and self.open[-1] == "style":
            self.styles.append(data)
        else:
            self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings[-1] += data


def rich_story() -> Story:
    """``whole_run`` with more trials, beats, a card's numbers and a score with examples."""
    story = whole_run()
    for number in range(12):
        story.train(
            story.trial(params((4, 8, 16, 32)[number % 4], 1e-3 * (1 + number / 3))), 1.5 + number / 10
        )
        story.add(Heartbeat(Beat(0, number, "train", 100, 1.0, (number + 1) * 2**28, 0.5 + number / 40)))
    story.add(CardWatched(3, CardUse(10, 3 * 2**30, 0, 0.8, 3.6e5, 61.0, {"heat": 0.1})))
    base = tuple(3.0 + k / 10 for k in range(12))
    adapter = tuple(loss - 1.0 - k / 100 for k, loss in enumerate(base))
    score = Score("ok", "fp32", 3.55, 2.5, base, adapter, tuple(range(5, 17)), 0.25, 0.75, 32)
    samples = ({"prompt": "1 + 1?", "reference": "2", "base": EVIL},)
    story.add(best_scored(story.history, replace(score, samples=samples)))
    return story


def numbers(story: Story) -> Numbers:
    """Its numbers, with the importance."""
    return numbers_of(story.entries, story.history, importances)


def loaded_by(found: Numbers, line: str) -> Numbers:
    """The same run, whose adapter is loaded by this line."""
    return replace(found, answer=replace(found.answer, loading=(line,)))


@pytest.fixture(scope="module")
def page_text() -> str:
    """A page with every figure."""
    return html_text(loaded_by(numbers(rich_story()), "from peft import PeftModel"))


def test_every_section_is_there_in_its_order(page_text: str) -> None:
    """What is missing, the answer, and so on as promised; the page is well-formed, and each link inside it
    leads somewhere."""
    found = Outline(page_text)
    assert found.headings == ["What is missing", *SECTIONS]
    assert len(set(found.ids)) == len(found.ids)
    inside = [a["href"] for tag, a in found.attributes if tag == "a"]
    assert inside
    assert all(link is not None and link[1:] in found.ids for link in inside)
    assert {name.removeprefix("figure-") for name in found.ids if name.startswith("figure-")} == FIGURES


def test_the_numbers_stand_in_the_text_too(page_text: str) -> None:
    """Whoever runs no script reads losses, intervals, counts, reasons and phases."""
    words = re.sub(r"\s+", " ", " ".join(Outline(page_text).words))
    story = rich_story()
    found = numbers(story)
    assert found.answer.loss is not None
    low = found.answer.loss.difference_nats_per_token.low
    assert low is not None
    for part in (
        "The adapter's validation loss is",
        f"{low:.4f}".replace("-", "−"),
        "n = 12 validation examples",
        "Accuracy: n = 32",
        "promotion: place 1 of 6 at rung 0",
        "full run starts",
        "loss is not finite",
        "80.0%",
        "0.100 kWh",
        "10.0% of the time",
        "schema budgetsearch.report, version 1",
    ):
        assert part in words, part


def test_nothing_is_fetched_and_only_our_scripts_may_run(page_text: str) -> None:
    """No address outside the page, and a policy that names the hashes of the two scripts."""
    found = Outline(page_text)
    for tag, attributes in found.attributes:
        assert not {"src", "srcset", "data", "action", "onload", "onclick"} & set(attributes), tag
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
    assert "url(" not in "".join(found.styles)
    assert "@import" not in "".join(found.styles)
    (policy,) = [str(a["content"]) for _, a in found.attributes if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'")
    allowed = re.findall(r"'(sha256-[^']+)'", policy)
    run = [text for attributes, text in found.scripts if attributes.get("type") != "application/json"]
    hashes = ["sha256-" + base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in run]
    assert allowed == hashes
    assert len(hashes) == 2


def test_every_figure_is_one_that_plotly_accepts(page_text: str) -> None:
    """Plotly's own classes know every key, and the page draws exactly these."""
    figures = figures_of(numbers(rich_story()))
    assert set(figures) == FIGURES
    for figure in figures.values():
        go.Figure(figure.data, figure.layout)
        assert figure.words
    (data,) = [text for attributes, text in Outline(page_text).scripts if attributes.get("id") == "figures"]
    assert json.loads(data) == {name: {"data": f.data, "layout": f.layout} for name, f in figures.items()}


def test_the_figures_show_the_numbers() -> None:
    """The ladder has every loss once, the timeline every segment, the front its trials."""
    found = numbers(rich_story())
    figures = figures_of(found)
    drawn = sorted(y for trace in figures["ladder"].data for y in trace["y"])
    known = [x for t in found.trials for x in t.rung_losses_nats_per_token if x is not None]
    assert drawn == sorted(known)
    bars = [trace for trace in figures["timeline"].data if trace["type"] == "bar" and "customdata" in trace]
    assert sum(len(trace["x"]) for trace in bars) == len(found.timeline.spans)
    marks = [trace for trace in figures["timeline"].data if trace["name"] == "promotion"]
    assert [len(trace["x"]) for trace in marks] == [len(found.promotions)]
    front = next(trace for trace in figures["memory_front"].data if trace["name"] == "Pareto front")
    assert len(front["x"]) == sum(1 for t in found.trials if t.on_memory_front)
    assert {trace["name"] for trace in figures["memory_over_time"].data} == {"memory in use", "utilization"}
    assert len(figures["rate"].data[0]["x"]) == sum(
        span.train_seconds > 0 and span.stop_tokens > span.start_tokens for span in found.timeline.spans
    )


def test_the_rate_shows_where_a_full_run_moved_its_end() -> None:
    """A diamond at the moment, with what it was and what was done."""
    story = paused()
    segment = story.start(1, 2, "full run starts")
    middle = (segment.start_tokens + segment.stop_tokens) // 2
    change = Revision(middle, replace(segment.schedule, stop_tokens=segment.stop_tokens - 1), 0.48)
    story.end(segment, 0.8, revisions=(change,))
    (_, moved) = figures_of(numbers(story))["rate"].data
    assert moved["name"] == "the end moves"
    assert "0.48 times as fast as foreseen" in moved["text"][0]
    span = next(one for one in numbers(story).timeline.spans if one.revisions)
    assert span.start_seconds <= 60 * moved["x"][0] <= span.stop_seconds  # drawn in minutes


def test_idle_seconds_do_not_look_like_lost_ones() -> None:
    """Each phase is in one group, each group has its own colour, and waiting is none of what a crash took."""
    phases = [phase for _, _, some in PHASE_GROUPS for phase in some]
    assert sorted(PHASES) == sorted(phases)
    assert len(PHASE_GROUPS) == len({colour for _, colour, _ in PHASE_GROUPS})
    found = {name: some for name, _, some in PHASE_GROUPS}
    assert (("idle",), ("crash", "down")) == (found["idle"], found["lost"])


def test_hostile_names_stay_text() -> None:
    """Scripts in a model's name, a path, a parameter, a reason, a detail, a sample: shown, never run."""
    story = Story()
    story.add(Opened(720.0, {"data": EVIL}, {**FACTS, "model": {"source": EVIL}, "card": {"name": EVIL}}))
    story.open()
    evil = {**params(), "quantization": "fp32", "note": EVIL}
    story.train(story.trial(evil, origin=EVIL), 1.0, 0, EVIL)
    story.train(0, 0.9, 1, EVIL)
    story.end(story.start(story.trial(evil)), status="crashed", detail=EVIL)
    samples = tuple({"prompt": EVIL, "reference": EVIL, "base": EVIL, "adapter": EVIL} for _ in range(2))
    score = Score("ok", EVIL, 2.0, 1.0, samples=samples)
    story.add(best_scored(story.history, score), Closed("failed", EVIL))
    assert story.history.opened is not None
    story.history.opened = replace(story.history.opened, facts={**FACTS, "model": {"source": EVIL}})
    text = html_text(loaded_by(numbers(story), EVIL))
    found = Outline(text)
    assert EVIL not in text
    assert len(found.scripts) == 3
    assert all(tag != "img" for tag, _ in found.attributes)
    assert "".join(found.words).count(EVIL) >= 10
    (data,) = [body for attributes, body in found.scripts if attributes.get("id") == "figures"]
    # plotly understands a few elements in its labels, so there the text is escaped once more
    assert "<" not in data
    assert "<script" not in json.dumps(json.loads(data))


def test_every_stage_of_a_run_has_a_page() -> None:
    """Before the first event, while it goes, without scores, interrupted, failed."""
    story = rich_story()
    cuts = range(0, len(story.entries), 1 + len(story.entries) // 12)
    for cut in cuts:
        entries = story.entries[:cut]
        shown = numbers_of(entries, fold(entries))
        missing = ["What is missing"] if shown.shortfalls else []
        assert Outline(html_text(shown)).headings == [*missing, *SECTIONS]
    begun = Story.planned()
    begun.add(Closed("failed", "the disk is full"))
    text = html_text(numbers(begun))
    for part in ("so there is no adapter", "the disk is full", "No trial has been promoted", "not measured"):
        assert part in text


# ----------------------------------------------------------------------- how it stands

HOLDER = """
import sys
from pathlib import Path
from budgetsearch.storage.lock import RunLock
RunLock(Path(sys.argv[1])).sign()
print("held", flush=True)
sys.stdin.read()
"""
"""A process that works on a run, as far as the lock tells."""


def write_ledger(folder: RunFolder, story: Story) -> None:
    """The story as a ledger on disk."""
    ledger, clock = Ledger(folder.ledger), Standing()
    for entry in story.entries:
        clock.at = entry.at
        ledger.append(entry.event, clock)
    ledger.close()


def texts_of(reports: reporting.Reports) -> dict[str, str]:
    """What the three say."""
    return {name: getattr(reports, name).read_text("utf-8") for name in ("html", "markdown", "json")}


def test_a_killed_run_is_not_called_going(tmp_path: Path) -> None:
    """While its process holds the lock it is still going; after kill -9 the page, the text, the numbers
    and the terminal say so, and what trained then was cut off."""
    folder = RunFolder(tmp_path)
    story = Story.planned()
    story.train(story.trial(), 1.5)
    story.start(story.trial())
    write_ledger(folder, story)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        going = texts_of(api.report(tmp_path))
        process.kill()
    killed = texts_of(api.report(tmp_path))
    assert ("still going" in going["html"], "still going" in killed["html"]) == (True, False)
    assert "State: search: it is going." in going["markdown"]
    for name in ("html", "markdown"):
        assert "State: stopped: its process was killed or its machine went down" in killed[name]
    before, after = json.loads(going["json"]), json.loads(killed["json"])
    assert [(one["run"]["state"], one["run"]["going"]) for one in (before, after)] == [
        ("search", True), ("stopped", False),
    ]  # fmt: skip
    assert [[t["status"] for t in one["trials"]] for one in (before, after)] == [
        ["paused", "running"], ["paused", "cut off"],
    ]  # fmt: skip
    assert [one["timeline"]["spans"][-1]["status"] for one in (before, after)] == ["running", "cut off"]
    assert [t["status"] for t in api.status(tmp_path)["trials"]] == ["paused", "cut off"]


@pytest.mark.parametrize(
    ("state", "shown"), [("finished", "deadline kept"), ("interrupted", "interrupted"), ("failed", "failed")]
)
def test_a_run_that_was_closed_says_how(state: str, shown: str) -> None:
    """Whatever the lock says: only a finished run has kept its deadline."""
    story = Story.planned()
    story.add(Closed(state, "because"))
    for going in (True, False):
        text = html_text(numbers_of(story.entries, story.history, going=going))
        assert re.search(rf"of 12.0 min; {shown}</span>", text)
        assert f"State: {state}: because." in text
        assert "still going" not in text


# ------------------------------------------------------------------------- the files


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ledger of a run that was played on virtual time."""
    path = tmp_path_factory.mktemp("played") / "ledger.sqlite"
    driver = make_driver(path, budget=1800.0, max_gang=4)
    driver.run()
    driver.ledger.close()
    return path


@pytest.fixture
def run_folder(played: Path, tmp_path: Path) -> RunFolder:
    """A run folder with nothing but its ledger."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    shutil.copy(played, folder.ledger)
    return folder


def test_report_writes_all_three(run_folder: RunFolder) -> None:
    """From the ledger alone, again and again the same, and nothing else is left behind."""
    first = api.report(run_folder.path)
    texts = [path.read_text(encoding="utf-8") for path in (first.html, first.markdown, first.json)]
    again = api.report(run_folder.path)
    assert texts == [path.read_text(encoding="utf-8") for path in (again.html, again.markdown, again.json)]
    names = {path.name for path in run_folder.path.iterdir()}
    assert {"report.html", "report.md", "report.json"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    assert api.status(run_folder.path)["reports"] == [str(first.html), str(first.markdown), str(first.json)]
    assert len(texts[0]) < 6_000_000


def test_a_folder_that_cannot_be_written_is_named(run_folder: RunFolder, monkeypatch: Any) -> None:
    """The error says what to do."""

    def full(path: Path, text: str) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, "replace_text", full)
    with pytest.raises(RunFolderError, match=r"cannot be written \(No space left on device\). Make room"):
        api.report(run_folder.path)


def test_the_api_keeps_its_report() -> None:
    """The package has a room of that name too: importing it later does not take the function's place."""
    code = "import budgetsearch as bs, budgetsearch.views.report.html; assert callable(bs.report), bs.report"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_in_place_of_a_run_is_told_from_one(run_folder: RunFolder, tmp_path: Path) -> None:
    """Whoever names the ledger or the report hears which folder is meant, quoted as a shell needs it."""
    spaced = RunFolder(run_folder.path.rename(tmp_path / "a run"))
    with pytest.raises(RunFolderError, match=r"ledger.sqlite is a file, not a run: the run is '.*/a run'\.$"):
        api.report(spaced.ledger)
    (tmp_path / "notes.txt").write_text("no run", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"notes.txt is a file, not a run: name the folder of a run"):
        api.report(tmp_path / "notes.txt")


def test_commands_to_type_are_quoted_for_the_shell(run_folder: RunFolder, tmp_path: Path) -> None:
    """A folder with a blank in its name is one word."""
    spaced = RunFolder(run_folder.path.rename(tmp_path / "a run"))
    assert f"`budgetsearch report '{spaced.path}'` writes it" in written(spaced, 2.0)
    with pytest.raises(RunFolderError, match=r"`budgetsearch resume '.*/a run'`"):
        spaced.check_free()


def written(folder: RunFolder, left: float) -> str:
    """What is told after the reports were written with so many seconds left."""
    entries = list(read_entries(folder.ledger))
    return reporting.write_in_time(folder, entries, fold(entries), left)


def test_with_time_left_everything_is_written_at_the_end(run_folder: RunFolder) -> None:
    """And there is nothing to tell."""
    assert written(run_folder, 300.0) == ""
    assert run_folder.report_html.is_file() and run_folder.report_json.is_file()


def test_without_time_there_is_report_md_and_word_of_how_to_get_the_rest(run_folder: RunFolder) -> None:
    """Two seconds before the deadline no library is begun with."""
    assert f"`budgetsearch report {run_folder.path}` writes it" in written(run_folder, 2.0)
    assert run_folder.report.is_file()
    assert not run_folder.report_html.exists()


def test_a_slow_library_does_not_cost_the_deadline(run_folder: RunFolder, monkeypatch: Any) -> None:
    """What is not done in time is let go of, and writes nothing afterwards."""
    monkeypatch.setitem(ENDING, "exit", 0.8)
    monkeypatch.setitem(ENDING, "reports", 0.0)

    def slow(history: History, importances: Importances | None) -> Importance:
        time.sleep(2.5 if importances else 0.0)
        return importance_of(history, importances)

    monkeypatch.setattr(numbers_module, "importance_of", slow)
    start = time.monotonic()
    assert "The time was over" in written(run_folder, 2.0)
    assert time.monotonic() - start < 1.8, "it waited into what is kept for the exit"
    for thread in threading.enumerate():
        if thread.name == "report":
            thread.join()
    assert not run_folder.report_json.exists()


def test_a_broken_library_does_not_fail_the_run(run_folder: RunFolder, monkeypatch: Any) -> None:
    """The run has ended well; the reason is told."""
    monkeypatch.setattr(offline, "plotly_library", lambda: 1 / 0)
    assert "report.html could not be written (division by zero)" in written(run_folder, 300.0)
    assert run_folder.report.is_file()


# ------------------------------------------------------------------------ the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    """One Chromium for all tests."""
    with browser_page() as page:
        yield page


@pytest.fixture(scope="module")
def page_file(page_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page as a file."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page_text, encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_the_page_fits_the_screen_and_draws_every_figure(browser: Page, page_file: Path, width: int) -> None:
    """No sideways scrolling on a phone; every figure has its drawing inside; no script complains; nothing but
    the file itself is asked for."""
    browser.open(page_file, width=width)
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width
    drawn = browser.run(
        "[...document.querySelectorAll('.plot')].map(p => [p.id, p.querySelectorAll('svg.main-svg').length, "
        "p.querySelector('svg.main-svg').getBoundingClientRect().width])"
    )
    assert {name.removeprefix("figure-") for name, _, _ in drawn} == FIGURES
    for name, pictures, wide in drawn:
        assert pictures > 0, name
        assert 0.8 * min(width, 800) < wide <= width, name
    assert browser.complaints() == []
    outside = [url for url in browser.requests() if not url.startswith(("file:", "data:", "blob:"))]
    assert outside == []


@pytest.mark.parametrize("dark", [False, True])
def test_it_is_readable_light_and_dark(browser: Page, page_file: Path, dark: bool) -> None:
    """All text stands out from the page (WCAG AA), and figures, drawn dark on light, turn with it."""
    browser.like_dark(dark)
    browser.open(page_file, width=1280)
    paper, filters = browser.run(
        "[getComputedStyle(document.body).backgroundColor, "
        "[...document.querySelectorAll('.plot, .keys i')].map(p => getComputedStyle(p).filter)]"
    )
    assert (paper == "rgb(255, 255, 255)") is not dark
    assert {"invert(1) hue-rotate(180deg)" if dark else "none"} == set(filters)
    assert min(browser.contrasts("body, .soft, .bad, a, td, th, strong, summary")) >= 4.5
    browser.like_dark(False)


def test_it_prints_on_paper(browser: Page, page_file: Path, tmp_path: Path) -> None:
    """Several pages of A4, figures no wider than the paper, and back on the screen they are as before."""
    browser.open(page_file, width=1280)
    browser.run(
        "void addEventListener('beforeprint', () => setTimeout(() => 0)), "
        "void addEventListener('afterprint', () => 0), "
        "void addEventListener('beforeprint', () => { window.printed = "
        "[...document.querySelectorAll('.plot svg.main-svg')].map(s => +s.getAttribute('width')); })"
    )
    data = browser.print_pdf(tmp_path / "report.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", data)) >= 3
    widths = browser.run("window.printed")
    assert widths
    assert max(widths) <= 680


def test_a_hostile_page_runs_nothing(browser: Page, tmp_path: Path) -> None:
    """In a real browser too: no alert, no element of the attacker's."""
    story = Story.planned()
    story.history.opened = Opened(720.0, {"data": EVIL}, {**FACTS, "model": {"source": EVIL}})
    story.train(story.trial({**params(), "note": EVIL}, origin=EVIL), 1.0, 0, EVIL)
    path = tmp_path / "report.html"
    path.write_text(html_text(loaded_by(numbers(story), EVIL)), encoding="utf-8")
    browser.open(path, width=800)
    assert browser.run("document.querySelectorAll('img, main script').length") == 0
    assert browser.run("document.querySelectorAll('.plot svg').length") > 0
    assert not [e for e in browser.events if e.get("method") == "Page.javascriptDialogOpening"]
    assert EVIL in browser.run("document.body.innerText")
