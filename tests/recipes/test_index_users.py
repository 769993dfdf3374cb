from pathlib import Path

import pytest

from tests.small_run import launch, load_recipe
from ulmrec_hf.user_index import UserIndex

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def test_both_scripts_run_alone(tmp_path, capsys):
    shared = ["--synthetic_users", "60", "--k_core", "0", "--output_dir", str(tmp_path)]
    load_recipe("extract_preferences").main(shared)
    assert (tmp_path / "preferences" / "preferences.parquet").is_file()
    settings = ["--codebook_size", "8", "--embedding_dim", "16", "--steps", "5", "--autoencoder_steps", "5"]
    load_recipe("index_users").main([*settings, *shared])
    assert str(tmp_path / "index" / "user_index.parquet") in capsys.readouterr().out
    assert len(UserIndex.from_parquet(tmp_path / "index" / "user_index.parquet")) == 60


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one(tmp_path):
    """From an empty folder: one prepares the data, both encode, one trains, without the other."""
    settings = ["--codebook_size", "8", "--code_dim", "6", "--embedding_dim", "16", "--autoencoder_steps", "5"]
    argv = [str(RECIPES / "index_users.py"), *settings, "--synthetic_users", "60", "--k_core", "0", "--output_dir"]
    config = str(RECIPES / "accelerate" / "cpu_2.yaml")
    for name, launcher in (("one", ()), ("two", ("-m", "accelerate.commands.launch", "--config_file", config))):
        done = launch([*argv, str(tmp_path / name)], launcher=launcher)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("User index: ") == 1
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert Path("index/user_index.parquet") in files
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path


@pytest.mark.parametrize("path", sorted((RECIPES / "configs" / "indexing").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_parse(path):
    index, _, stage = (
        load_recipe("index_users").make_parser().parse_args_and_config(["--config", str(path), "--output_dir", "x"])
    )
    assert (
        index.inputs == {"paper": ["auto"], "mixed": ["titles", "cooccurrence"]}.get(path.stem, [path.stem])
        and index.codebook_size == 256
        and stage.output_dir == "x"
    )


def test_unknown_key(tmp_path):
    (tmp_path / "bad.yaml").write_text("codebok_size: 8\n")
    with pytest.raises(ValueError, match="codebok_size"):
        load_recipe("index_users").main(["--config", str(tmp_path / "bad.yaml"), "--output_dir", str(tmp_path)])
