"""What a report compares: which tasks each system is tuned on, and what it is scored by."""

import pytest

from ulmrec_hf.systems import ABLATIONS, COMPARED, RANKER
from ulmrec_hf.tasks.records import TASKS

MIXTURE = dict.fromkeys(TASKS, 1.0) | {"next_item": 3.0}


def test_without_an_index_no_task_is_left_that_is_about_it():
    assert RANKER.mixture(MIXTURE, TASKS) == MIXTURE
    assert ABLATIONS["placebo"].mixture(MIXTURE, TASKS) == MIXTURE
    assert ABLATIONS["no_index"].mixture(MIXTURE, TASKS) == {"next_item": 3.0, "rating": 1.0, "intent_next_item": 1.0}
    assert ABLATIONS["history_only"].mixture(MIXTURE, TASKS) == {"next_item": 3.0}


def test_a_mixture_of_which_nothing_is_left_is_refused():
    with pytest.raises(ValueError, match=r"leaves ulmrec_history_only nothing.*take history_only out of ablations"):
        ABLATIONS["history_only"].mixture({"rating": 1.0, "next_item": 0.0}, TASKS)


def test_systems_are_scored_by_the_ranker_themselves_or_the_base():
    assert {name: system.model for name, system in ABLATIONS.items() if system.model != "own"} == {
        "index_only": "ranker",
        "unknown_user": "ranker",
        "zero_shot": "base",
    }
    assert {name for pair in COMPARED for name in pair} <= {
        "retriever",
        "random",
        RANKER.name,
        *(system.name for system in ABLATIONS.values()),
    }
