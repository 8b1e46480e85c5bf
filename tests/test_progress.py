"""Bars for a person who waits, and nothing but lines for a file."""

import io
import sys

import pytest

from longmix import progress


@pytest.fixture
def shown(monkeypatch):
    """`shown(terminal, patience)` makes standard error a terminal or a file, and returns what is written to it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")

    def begin(terminal: bool, patience: float = -1) -> io.StringIO:
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(progress, "PATIENCE_SECONDS", patience)
        return stream

    return begin


def documents(description: str) -> None:
    with progress.documents_bar(description) as advance:
        advance(1, 500_000, 100)
        advance(2, 1_500_000, 400)


def weights(description: str) -> None:
    with progress.bytes_bar(description, 4_000_000) as advance:
        advance(1_000_000)


def steps(description: str) -> None:
    with progress.steps_bar(description, 4) as advance:
        advance()


def items(description: str) -> None:
    assert list(progress.tracked([1, 2], description)) == [1, 2]


LATE = {"documents": (documents, "3 documents, 2.0 MB"), "bytes": (weights, "1.0/4.0 MB")}
AT_ONCE = {"steps": (steps, "25%"), "items": (items, "100%")}
BARS = LATE | AT_ONCE


@pytest.mark.parametrize(("work", "figure"), BARS.values(), ids=BARS)
class TestBars:
    def test_on_a_terminal(self, shown, work, figure):
        stream = shown(True)
        work("reading")
        assert "reading" in stream.getvalue() and figure in stream.getvalue()

    @pytest.mark.parametrize("forced", [False, True])
    def test_a_file_shows_nothing(self, shown, monkeypatch, work, figure, forced):
        if forced:  # as services that keep the colours of a log do
            monkeypatch.setenv("FORCE_COLOR", "1")
        stream = shown(False)
        work("reading")
        assert stream.getvalue() == ""

    @pytest.mark.parametrize("name", ["runs/{x}", "runs/{0}", "runs/[red]", "runs/[/]"])
    def test_a_path_is_text(self, shown, work, figure, name):
        stream = shown(True)
        work(name)
        assert name in stream.getvalue()

    def test_control_characters_are_shown(self, shown, work, figure):
        stream = shown(True)
        work("a\x1b]0;title\x07b")
        assert "\x1b]0;" not in stream.getvalue()


@pytest.mark.parametrize(("work", "figure"), LATE.values(), ids=LATE)
def test_quick_work_shows_nothing(shown, work, figure):
    stream = shown(True, patience=10)
    work("reading")
    assert stream.getvalue() == ""


def test_items_may_be_shown_to_nobody(shown):
    stream = shown(True)
    assert list(progress.tracked(iter("ab"), "reading", total=2, shown=False)) == ["a", "b"]
    assert stream.getvalue() == ""


class TestTraining:
    METRICS = {"train/loss": 2.5, "throughput/tokens_per_second": 1234.0}  # noqa: RUF012

    def displayed(self, **words) -> progress.ProgressDisplay:
        display = progress.ProgressDisplay(total_steps=10, first_step=2, **words)
        display.open()
        display.advance(4, 2.25, 1000.0)
        display.show(4, self.METRICS)
        display.message("validated")
        display.close()
        return display

    def test_a_terminal_has_a_bar(self, shown):
        stream = shown(True)
        display = self.displayed()
        written = stream.getvalue()
        assert "loss 2.250  1,000 tokens/s" in written and "validated" in written and "step 4/10" not in written
        assert not display.is_live

    @pytest.mark.parametrize("forced", [False, True])
    def test_a_file_has_lines(self, shown, monkeypatch, forced):
        if forced:
            monkeypatch.setenv("FORCE_COLOR", "1")
        stream = shown(False)
        self.displayed()
        first, second = stream.getvalue().splitlines()
        assert first.startswith("step 4/10  loss 2.500  1,234 tokens/s  left 0:00:0")
        assert second == "validated"

    def test_other_processes_are_silent(self, shown):
        stream = shown(True)
        self.displayed(enabled=False)
        assert stream.getvalue() == ""

    @pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (61, "0:01:01"), (36_001, "10:00:01")])
    def test_durations(self, seconds, text):
        assert progress.duration(seconds) == text
