"""The activation schedule: phases, annealing, and what it refuses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from stocha_hf.errors import StochaError
from stocha_hf.training.schedule import Schedule

STOCHA_FT = [{"activation": "stocha", "p": 0.3, "until": 0.8}, {"activation": "relu", "until": 1.0}]
ANNEALED = [{"activation": "stocha", "p": [0.5, 0.1], "until": 0.6}, {"activation": "relu", "until": 1}]


def test_a_phase_ends_just_before_its_until():
    schedule = Schedule.parse(STOCHA_FT)
    steps = [schedule.at(step / 10) for step in range(10)]
    assert steps == [(0, "stocha", 0.3, None)] * 8 + [(1, "relu", 0.3, None)] * 2
    assert schedule.at(1.0) == (1, "relu", 0.3, None)


def test_linear_annealing_runs_from_the_first_to_the_last_value_within_its_phase():
    schedule = Schedule.parse(ANNEALED)
    values = [schedule.at(step / 100).p for step in range(60)]
    assert values[0] == 0.5 and values[30] == pytest.approx(0.3) and values[-1] == pytest.approx(0.1, abs=0.01)
    assert all(before > after for before, after in pairwise(values))


def test_cosine_annealing_is_flat_at_both_ends_and_meets_the_linear_one_in_the_middle():
    schedule = Schedule.parse([{"activation": "stocha", "p": [1.0, 0.0], "anneal": "cosine", "until": 1.0}])
    assert schedule.at(0.5).p == pytest.approx(0.5)
    assert schedule.at(0.25).p == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert 1 - schedule.at(0.05).p < 0.05 / 2


def test_the_second_phase_anneals_over_its_own_share():
    phases = [{"activation": "silu", "until": 0.5}, {"activation": "stocha", "p": [0.8, 0.4], "until": 1.0}]
    assert Schedule.parse(phases).at(0.75) == (1, "stocha", pytest.approx(0.6), None)


def test_text_and_lists_give_the_same_schedule():
    text = "[{activation: stocha, p: 0.3, until: 0.8}, {activation: relu, until: 1.0}]"
    assert Schedule.parse(text) == Schedule.parse(STOCHA_FT)
    assert Schedule.parse(Schedule.parse(ANNEALED).to_list()) == Schedule.parse(ANNEALED)


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ([{"activation": "relu", "until": 0.9}], "expected the last one to end at until: 1.0"),
        ([{"activation": "relu", "until": 1.2}], "expected the last one to end"),
        ([], "expected the last one to end"),
        ([{"activation": "silu", "until": 0.9}, {"activation": "relu", "until": 0.9}], "expected the last one"),
        ([{"activation": "silu", "until": 1.0}, {"activation": "relu", "until": 1.0}], "expected rising values"),
        ([{"activation": "stocha", "p": 1.5, "until": 1.0}], "p is 1.5: expected a probability"),
        ([{"activation": "stocha", "p": [0.5, -0.1], "until": 1.0}], "p is -0.1"),
        ([{"activation": "stocha", "p": [0.5, 0.2, 0.1], "until": 1.0}], "expected a number, or"),
        ([{"activation": "swish", "until": 1.0}], "activation is 'swish'"),
        ([{"activation": "relu", "until": 1.0, "untill": 1}], "key 'untill'"),
        ([{"activation": "relu"}], "no 'until'"),
        ([{"activation": "stocha", "p": [0.5, 0.1], "anneal": "exp", "until": 1.0}], "anneal is 'exp'"),
        ("relu", "expected a list"),
        ("[{activation: relu", "the schedule is not YAML, line 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(phases, words):
    with pytest.raises(StochaError, match=words) as refusal:
        Schedule.parse(phases)
    assert "\n" not in str(refusal.value)


def test_sparsity_is_held_or_annealed_over_a_phase():
    phases = [
        {"activation": "fatrelu", "sparsity": [0.6, 0.9], "until": 0.5},
        {"activation": "fatrelu", "sparsity": 0.9, "until": 1.0},
    ]
    schedule = Schedule.parse(phases)
    assert [schedule.at(at).sparsity for at in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([0.6, 0.75, 0.9, 0.9])
    assert [{k: v for k, v in row.items() if k in phases[0]} for row in schedule.to_list()] == phases


def test_the_history_holds_what_has_an_effect():
    phases = [{"activation": "stocha", "until": 0.5, "p": 0.3}, {"activation": "relu", "until": 1.0}]
    assert Schedule.parse(phases).to_list() == phases
    assert Schedule.parse([phases[0], phases[1] | {"p": 0.7}]).to_list() == phases
