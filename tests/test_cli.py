"""What the commands share: `python -m`, the types of options, one line on stderr, JSON that every reader takes."""

from __future__ import annotations

import argparse
import json
import runpy
import sys

import pytest
from helpers.bad_inputs import TABLES

from stocha_hf.cli import Parser, checked, hub_id, path_or_id, run, show, whole_number
from stocha_hf.errors import StochaError


@pytest.mark.parametrize("verb", sorted(TABLES))
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_python_m_runs_the_command(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [verb, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"stocha_hf.cli.{verb}", run_name="__main__")
    assert stop.value.code == 0
    assert f"usage: stocha-{verb}" in capsys.readouterr().out


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    show({"a": 0.5}, "text", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": 0.5}
    for value in (float("nan"), float("-inf")):
        with pytest.raises(StochaError, match="NaN or infinite, which JSON cannot hold"):
            show({"a": [value]}, "text", as_json=True)


@pytest.mark.parametrize(
    ("convert", "good", "bad"),
    [
        (whole_number(2, 8), ["2", "8", "+3"], ["1", "9", "2.5", "", "two", "1e1"]),
        (path_or_id, ["a", "org/name", "/no/such", "a b"], ["", " ", "x" * 300, "~nosuchuser/x"]),
        (
            hub_id,
            ["name", "org/name", "o-r.g_/n.a-m_e"],
            ["", "a/b/c", "-x", "x-", "a--b", "a..b", "a b", "o/n\n", "é"],
        ),
        (checked(float, lambda x: x > 0, "more"), ["1", "inf"], ["0", "nan", "x"]),
    ],
)
def test_types_of_options(convert: object, good: list[str], bad: list[str]) -> None:
    for text in good:
        convert(text)  # type: ignore[operator]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected|is not a path"):
            convert(text)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (StochaError("one\ntwo\x1b[31m"), "one\\ntwo\\x1b[31m"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
    ],
)
def test_an_error_is_one_line(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as stop:
        run(Parser("stocha-x", "Doc."), fail)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("stocha-x: ") and len(err.splitlines()) == 1 and words in err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(RuntimeError, match="a bug"):
        run(Parser("stocha-x", "Doc."), lambda args: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_figures_name_the_command_also_where_it_was_started_as_a_module(monkeypatch) -> None:
    from stocha_hf.cli import eval as verb
    from stocha_hf.measurement.provenance import circumstances

    for started in ("/usr/bin/stocha-eval", verb.__file__):
        monkeypatch.setattr(sys, "argv", [str(started), "a model", "--json"])
        assert circumstances()["command"] == "stocha-eval 'a model' --json"
