"""Settings of the tasks."""

import pytest

from ulmrec_hf.tasks.arguments import TaskArguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 53}, "num_candidates is 53; it must be a whole number of 2 to 52"),
        ({"max_history": -1}, "max_history is -1"),
        ({"hard_negatives": 1.5}, "hard_negatives is 1.5; it must be a share"),
        ({"evaluation_order": "best"}, "evaluation_order is 'best'"),
        ({"mixture": {"nonsense": 1.0}}, "mixture is .*nonsense"),
        ({"mixture": {"rating": -1.0}}, "numbers of at least 0"),
        ({"mixture": "{"}, "must be JSON"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        TaskArguments(**settings)


def test_settings_come_from_yaml_and_the_command_line(tmp_path):
    from trl import TrlParser

    config = tmp_path / "tasks.yaml"
    config.write_text("num_candidates: 8\nmixture: {next_item: 1.0, rating: 0.25}\n", encoding="utf-8")
    (args,) = TrlParser([TaskArguments]).parse_args_and_config(["--config", str(config), "--max_history", "3"])
    assert (args.num_candidates, args.max_history, args.mixture) == (8, 3, {"next_item": 1.0, "rating": 0.25})
    (args,) = TrlParser([TaskArguments]).parse_args_and_config(["--mixture", '{"rating": 1}'])
    assert args.mixture == {"rating": 1}
