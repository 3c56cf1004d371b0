"""Long work says how far it is: a bar on a terminal, and elsewhere a line on stderr now and then."""

from __future__ import annotations

import re
import sys

from test_imports import PACKAGE, sources

from stocha_hf.progress import Progress


def work(clock: list[float], seconds: float) -> None:
    with Progress(total=4, desc="Working", unit="step") as bar:
        bar._time = lambda: clock[0]  # seconds pass as the test says
        bar.start_t = bar.last_print_t = clock[0]
        for _ in range(4):
            clock[0] += seconds
            bar.update()


def test_where_nobody_watches_a_line_is_written_every_30_seconds(capsys) -> None:
    work([0.0], 20.0)
    out, err = capsys.readouterr()
    assert out == "" and [line[:17] for line in err.splitlines()] == ["Working:  50% 2/4", "Working: 100% 4/4"]
    assert "\r" not in err


def test_short_work_leaves_nothing_in_a_log(capsys) -> None:
    work([0.0], 7.0)
    assert [*Progress(range(3))] == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_that_goes_when_it_is_done(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    work([0.0], 1.0)
    shown = capsys.readouterr().err
    assert "Working: 100%" in shown and "\n" not in shown
    assert shown.rpartition("\r")[0].rpartition("\r")[2].strip() == ""


def test_every_long_loop_uses_it() -> None:
    users = {name for name, path in sources(PACKAGE).items() if re.search(r"(from|import) tqdm", path.read_text())}
    assert users == {"progress"}
