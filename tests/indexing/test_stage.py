import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data_stage import TASTES, write_data_stage
from tests.indexing.test_encoder import make_bert
from ulmrec_hf.indexing import encoder as encoders
from ulmrec_hf.indexing.arguments import IndexArguments
from ulmrec_hf.indexing.indexer import UserIndexer
from ulmrec_hf.indexing.stage import _save_encoder, index_users
from ulmrec_hf.tables import LeaveOneOut
from ulmrec_hf.user_index import UserIndex

SMALL = {"codebook_size": 8, "levels": 3, "code_dim": 6, "embedding_dim": 16, "steps": 20, "autoencoder_steps": 10}


def run_stage(args, data_folder, output_dir):
    return index_users(args, LeaveOneOut.load(data_folder), output_dir)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_data_stage(folder / "data")
    return run_stage(IndexArguments(**SMALL), folder / "data", folder)


def test_every_user_has_an_index_of_their_own(stage):
    index = UserIndex.from_parquet(stage / "user_index.parquet")
    assert len(index) == 60 and index.levels == 3 and index.codebook_size == 8
    assert np.diff(index.earlier.offsets).tolist() == [2, 3, 4, 5] * 15  # one for each training target
    report = json.loads((stage / "report.json").read_text())
    assert report["users"] == 60 and report["collisions_after"] == 0 <= report["collisions_before"]
    assert len(report["codes_used"]) == len(report["perplexity"]) == len(report["reconstruction_error"]) == 3
    assert (report["inputs"], report["users_without_inputs"], report["encoder"]) == ("reviews x 1", 0, "tfidf")
    assert report["lift_heldout"][0] > 1 and not (stage / "embeddings").exists()
    assert (stage / "stage.json").is_file()


def test_users_of_one_taste_are_near(stage):
    codes = UserIndex.from_parquet(stage / "user_index.parquet").codes[:, 0]
    tastes = np.arange(60) % len(TASTES)
    same = (tastes[:, None] == tastes) & ~np.eye(60, dtype=bool)
    agree = codes[:, None] == codes
    assert agree[same].mean() > 3 * agree[tastes[:, None] != tastes].mean()


def test_saved_indexer_indexes_new_users_near_their_like(stage):
    indexer = UserIndexer.from_pretrained(stage / "indexer")
    index = UserIndex.from_parquet(stage / "user_index.parquet")
    interactions = pq.read_table(stage.parent / "data" / "interactions.parquet").to_pandas()
    whole = index
    for user in range(8):
        rows = interactions[interactions["user"] == user][:-2]
        reviews = [f"{row.summary or ''} {row.review}".strip() for row in rows.itertuples()]
        new = indexer.index_new(reviews, used=whole, user_id=f"new{user}")
        assert new.codes[0, 0] == index.codes[user, 0]  # what they wrote decides, not their ids
        whole = whole.merge(new)
    assert len(whole) == 68 and whole.codes[:60].tolist() == index.codes.tolist()
    with pytest.raises(ValueError, match="User 'new0' has an index already"):
        indexer.index_new(["again"], used=whole, user_id="new0")
    with pytest.raises(ValueError, match="reviews is one string; give a list"):
        indexer.index_new("again", used=whole, user_id="other")
    with pytest.raises(ValueError, match="user_id must be a string, '5' say; got 5"):
        indexer.index_new(["again"], used=whole, user_id=5)
    with pytest.raises(ValueError, match="titles: this index was made from reviews"):
        indexer.index_new(["again"], used=whole, user_id="other", titles=["tent"])


def test_a_new_user_as_people_have_them(stage, caplog):
    indexer = UserIndexer.from_pretrained(stage / "indexer")
    index = UserIndex.from_parquet(stage / "user_index.parquet")
    expected = indexer.index_new(["a rugged tent", "so rugged"], used=index, user_id="new").codes.tolist()
    assert indexer.index_new(iter(["a rugged tent", "so rugged"]), used=index, user_id="new").codes.tolist() == expected
    indexer.index_new(["a rugged \ud83d tent"], used=index, user_id="half")
    assert not caplog.records
    for nothing in ([], [""], ["zzz"], None):
        indexer.index_new(nothing, used=index, user_id="stranger")
        assert "User 'stranger' has nothing to be indexed by" in caplog.text
        caplog.clear()


def test_the_inputs_of_another_encoder_are_refused(stage, tmp_path):
    shutil.copytree(stage / "indexer", tmp_path / "indexer")
    config = tmp_path / "indexer" / "config.json"
    config.write_text(config.read_text().replace('"encoder_name": "tfidf"', '"encoder_name": "bert"'))
    with pytest.raises(
        ValueError, match=r"for the encoder 'bert' and vectors of length \d+; .* of the encoder 'tfidf'"
    ):
        UserIndexer.from_pretrained(tmp_path / "indexer")


def test_any_mix_of_inputs(tmp_path):
    write_data_stage(tmp_path / "data")
    args = IndexArguments(
        inputs=["titles", "cooccurrence"], input_weights=[1.0, 2.0], attention=False, cooccurrence_dim=8, **SMALL
    )
    folder = run_stage(args, tmp_path / "data", tmp_path)
    report = json.loads((folder / "report.json").read_text())
    assert report["inputs"] == "titles x 1, cooccurrence x 2" and report["lift_heldout"][0] > 1
    assert {file.name for file in (folder / "indexer").iterdir()} - {"README.md"} == {
        "config.json",
        "encoder",
        "inputs.json",
        "item_vectors.safetensors",
        "items.json",
        "model.safetensors",
    }
    indexer = UserIndexer.from_pretrained(folder / "indexer")
    index = UserIndex.from_parquet(folder / "user_index.parquet")
    sequences = pq.read_table(tmp_path / "data" / "sequences.parquet").to_pandas()
    items = pq.read_table(tmp_path / "data" / "items.parquet").to_pandas().set_index("item")
    for user in (0, 17):
        train = sequences["items"][user][:-2]
        values = {"titles": items["title"][train].tolist(), "cooccurrence": items["item_id"][train].tolist()}
        new = indexer.index_new(used=index, user_id="new", **values)
        assert new.codes[0, 0] == index.codes[user, 0]  # what a user did, not who, decides without attention
    with pytest.raises(ValueError, match="one value for each interaction; got 1 titles, 2 cooccurrence"):
        indexer.index_new(used=index, user_id="new", titles=["a"], cooccurrence=["b", "c"])


def test_an_input_that_the_data_does_not_have(tmp_path):
    write_data_stage(tmp_path / "data", 20)
    with pytest.raises(ValueError, match=r"inputs holds ratings, but .* has none in its train part"):
        run_stage(IndexArguments(inputs=["titles", "ratings"], **SMALL), tmp_path / "data", tmp_path)


def test_a_killed_run_resumes_with_its_embeddings_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    for run in ("whole", "killed"):
        write_data_stage(tmp_path / run / "data", 20)
    whole = run_stage(IndexArguments(**SMALL), tmp_path / "whole" / "data", tmp_path / "whole")

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ulmrec_hf.indexing.indexer.UserIndexer.train_on", kill)
        with pytest.raises(KeyboardInterrupt):
            run_stage(IndexArguments(**SMALL), tmp_path / "killed" / "data", tmp_path / "killed")
    shards = tmp_path / "killed" / "index.partial" / "embeddings"
    assert list(shards.rglob("embeddings-*")) and (shards / "encoder").is_dir()
    monkeypatch.setattr(encoders.TfidfEncoder, "fit", kill)  # another machine might round otherwise
    encode = encoders.TfidfEncoder.encode
    asked = []
    monkeypatch.setattr(encoders.TfidfEncoder, "encode", lambda self, texts: asked.append(texts) or encode(self, texts))
    killed = run_stage(IndexArguments(**SMALL), tmp_path / "killed" / "data", tmp_path / "killed")
    assert not asked
    for name in ("user_index.parquet", "report.json", "indexer/model.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_embeddings_of_an_encoder_that_has_changed_are_made_again(tmp_path, caplog):
    write_data_stage(tmp_path / "data", 20)
    whole = run_stage(IndexArguments(**SMALL), tmp_path / "data", tmp_path)
    expected = (whole / "user_index.parquet").read_bytes()
    whole.rename(tmp_path / "index.partial")
    old = tmp_path / "index.partial" / "embeddings" / "encoder"
    encoders.TfidfEncoder(16).fit(["other words", "than these"]).save(old.mkdir(parents=True) or old)
    saved = old / "encoder.json"
    saved.write_text(saved.read_text().replace('"weights": "', '"weights": "0'))
    again = run_stage(IndexArguments(**SMALL), tmp_path / "data", tmp_path)
    assert (again / "user_index.parquet").read_bytes() == expected
    assert "The embeddings so far are dropped. The encoder 'tfidf' has other weights" in caplog.text


def test_a_model_out_of_reach_costs_no_embeddings(tmp_path, monkeypatch):
    write_data_stage(tmp_path / "data", 20)
    bert = make_bert(tmp_path / "bert")
    args = IndexArguments(encoder=bert, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("ulmrec_hf.indexing.indexer.UserIndexer.train_on", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_stage(args, tmp_path / "data", tmp_path)
    shards = sorted((tmp_path / "index.partial").rglob("embeddings-*"))
    (tmp_path / "bert").rename(tmp_path / "away")
    with pytest.raises(ValueError, match="bert"):
        _save_encoder(
            args, {"reviews": LeaveOneOut.load(tmp_path / "data").texts()}, tmp_path / "index.partial" / "embeddings"
        )
    assert shards and sorted((tmp_path / "index.partial").rglob("embeddings-*")) == shards
    (tmp_path / "away").rename(tmp_path / "bert")
    monkeypatch.setattr(encoders.PretrainedEncoder, "encode", lambda *_: 1 / 0)
    run_stage(args, tmp_path / "data", tmp_path)
    (tmp_path / "bert" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index was made with other settings: encoder was .*--overwrite"):
        run_stage(args, tmp_path / "data", tmp_path)


def test_damaged_files_of_a_killed_run_are_made_again(tmp_path, monkeypatch, caplog):
    write_data_stage(tmp_path / "data", 20)
    whole = run_stage(IndexArguments(**SMALL), tmp_path / "data", tmp_path)
    expected = (whole / "user_index.parquet").read_bytes()
    shutil.rmtree(whole)
    partial = tmp_path / "index.partial"
    for name in ("embeddings/encoder/tfidf.safetensors", "embeddings/reviews/embeddings.json", "stage.json"):
        with monkeypatch.context() as patch:
            patch.setattr("ulmrec_hf.indexing.indexer.UserIndexer.train_on", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run_stage(IndexArguments(**SMALL), tmp_path / "data", tmp_path)
        (partial / name).write_bytes(b"")
    run_stage(IndexArguments(**SMALL), tmp_path / "data", tmp_path)
    assert (whole / "user_index.parquet").read_bytes() == expected
    assert "The embeddings so far are dropped" in caplog.text and "is begun anew" in caplog.text
    (whole / "stage.json").write_bytes(b"")
    with pytest.raises(ValueError, match=r"index.stage\.json is damaged: remove the folder .*index and run again"):
        run_stage(IndexArguments(**SMALL), tmp_path / "data", tmp_path)


def test_a_training_that_diverges_is_an_error(tmp_path):
    write_data_stage(tmp_path / "data", 20)
    with pytest.raises(ValueError, match=r"learning_rate is 1e\+30, with which the training diverged"):
        run_stage(IndexArguments(**SMALL, learning_rate=1e30), tmp_path / "data", tmp_path)


def test_presets_bring_their_settings():
    default, paper = IndexArguments(), IndexArguments(preset="paper", code_dim=16)
    assert not default.attention and default.steps == 0 and default.refit_codebooks
    assert paper.attention and paper.steps > 0 and not paper.refit_codebooks and paper.code_dim == 16


@pytest.mark.parametrize("reviews", [True, False])
def test_held_out_interactions_change_no_byte(reviews, tmp_path):
    folders = []
    for other in (False, True):
        data = write_data_stage(tmp_path / str(other) / "data", 40, reviews=reviews, other_held_out=other)
        folders.append(run_stage(IndexArguments(**SMALL), data, tmp_path / str(other)))
    files = [
        file.relative_to(folders[0]) for file in folders[0].rglob("*") if file.is_file() and file.name != "stage.json"
    ]
    assert len(files) >= 7
    reports = {"report.json", "report.md", "lift.png"}  # the lift of held-out items reads them
    for file in files:
        if file.name not in reports:
            assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
    changed = [json.loads((folder / "report.json").read_text()) for folder in folders]
    assert {name for name in changed[0] if changed[0][name] != changed[1][name]} <= {
        "lift_heldout",
        "lift_heldout_interval",
        "shared_heldout",
    }


def test_user_without_text_is_logged_and_counted(tmp_path, caplog):
    write_data_stage(tmp_path / "data", 20, silent=(3, 4))
    folder = run_stage(IndexArguments(**SMALL), tmp_path / "data", tmp_path)
    assert json.loads((folder / "report.json").read_text())["users_without_inputs"] == 2
    assert "2 users have nothing in their train part" in caplog.text
    assert len(UserIndex.from_parquet(folder / "user_index.parquet")) == 20


def test_nan_embeddings(tmp_path, monkeypatch):
    write_data_stage(tmp_path / "data", 20)
    monkeypatch.setattr(
        encoders.TfidfEncoder, "encode", lambda self, texts: np.full((len(texts), 8), np.nan, np.float32)
    )
    with pytest.raises(ValueError, match=r"'tfidf' gave NaN or infinite embeddings for \d+ of \d+ texts"):
        run_stage(IndexArguments(**SMALL), tmp_path / "data", tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data", "index.partial"]
    assert not list((tmp_path / "index.partial").rglob("embeddings-*"))  # nothing half-written


def test_codebook_too_small(tmp_path):
    write_data_stage(tmp_path / "data", 20)
    with pytest.raises(ValueError, match="codebook_size must be at least 5"):
        run_stage(IndexArguments(codebook_size=4, levels=2), tmp_path / "data", tmp_path)


def test_not_run_again_and_other_settings_refused(stage):
    index, record = stage / "user_index.parquet", (stage / "stage.json").stat().st_mtime_ns
    args = (stage.parent / "data", stage.parent)
    assert run_stage(IndexArguments(**SMALL), *args) == stage and (stage / "stage.json").stat().st_mtime_ns == record
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        run_stage(IndexArguments(**SMALL, seed=1), *args)
    assert index.is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputs": ["words"]}, "inputs is .'words'.; it must hold some of auto, reviews, titles, cooccurrence"),
        ({"inputs": ["auto", "titles"]}, "inputs holds auto, which stands for reviews or titles"),
        ({"input_weights": [1, 2]}, "input_weights has 2 numbers for 1 inputs"),
        ({"input_weights": [0]}, "each must be between 0.001 and 1000"),
        ({"pooling": "sum"}, "pooling is 'sum'; it must be one of auto, cls, mean, max"),
        ({"preset": "best"}, "preset is 'best'"),
        ({"indexer": "magic"}, "indexer is 'magic'; it must be one of rq_vae, residual_kmeans"),
        ({"index_kind": "hash"}, "index_kind is 'hash'; it must be one of codes, text, number, id"),
        ({"codebook_size": 0}, "codebook_size is 0; it must be between 1 and 65536"),
        ({"levels": 27}, "levels is 27; it must be between 1 and 26"),
        ({"max_reviews": 0}, "max_reviews is 0; it must be above 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be above 0, and finite"),
        ({"code_dim": 2.5}, "code_dim is 2.5; it must be a whole number"),
        ({"steps": -1}, "steps is -1; it must be 0 or more"),
        ({"codebook_size": 16.5}, "codebook_size is 16.5; it must be a whole number"),
        ({"attention": "no"}, "attention is 'no'; it must be true or false"),
        ({"input_weights": 2.0}, "input_weights is 2.0; it must be a list of numbers"),
        ({"seed": 2**32}, "seed is 4294967296; it must be below"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        IndexArguments(**settings)
