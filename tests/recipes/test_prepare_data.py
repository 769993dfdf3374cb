import json

import pytest

from tests.small_run import load_recipe


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("prepare_data")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "data.csv"
    rows = [f"u{user},i{item},{item},4" for user in range(4) for item in range(5)]
    path.write_text("\n".join(["user_id,item_id,timestamp,rating", *rows]) + "\n")
    return path


def test_command_line(recipe, source, tmp_path, capsys):
    out = tmp_path / "out"
    recipe.main(["--data_format", "csv", "--interactions", str(source), "--k_core", "3", "--output_dir", str(out)])
    assert json.loads((out / "data/summary.json").read_text())["interactions"] == 20
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["users", "4"] in lines and ["items", "5"] in lines and ["interactions", "20"] in lines


def test_yaml_and_overwrite(recipe, source, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data_format: csv\ninteractions: {source}\nk_core: 0\noutput_dir: {tmp_path / 'out'}\n", encoding="utf-8"
    )
    recipe.main(["--config", str(config)])
    with pytest.raises(ValueError, match="k_core was 0, is 4"):
        recipe.main(["--config", str(config), "--k_core", "4"])
    recipe.main(["--config", str(config), "--k_core", "4", "--overwrite"])
    assert json.loads((tmp_path / "out/data/summary.json").read_text())["item_minimum"] == 4


@pytest.mark.parametrize(
    ("yaml", "error"),
    [
        ("kcore: 3", "Unknown arguments from config file.*kcore"),
        ("data_format: xml", "data_format is 'xml'; it must be one of"),
        ("data_format: csv\ninteractions: nowhere.csv", r"interactions: nowhere\.csv does not exist"),
    ],
)
def test_bad_settings(recipe, tmp_path, yaml, error):
    config = tmp_path / "config.yaml"
    config.write_text(yaml + f"\noutput_dir: {tmp_path / 'out'}\n")
    with pytest.raises(ValueError, match=error):
        recipe.main(["--config", str(config)])
    assert not (tmp_path / "out").exists()


def test_help_shows_our_settings(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    text = capsys.readouterr().out
    assert text.index("--data_format") < text.index("--k_core") < text.index("--output_dir")
    assert "the toy world" in text
