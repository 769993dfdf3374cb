import json

import numpy as np
import pytest

from tests.data_stage import TASTES, write_data_stage
from ulmrec_hf.indexing import encoder as encoders
from ulmrec_hf.indexing.arguments import IndexArguments
from ulmrec_hf.indexing.assignment import assign_new
from ulmrec_hf.indexing.build import index_users
from ulmrec_hf.indexing.encoder import load_encoder
from ulmrec_hf.indexing.indexer import UserDataset, UserIndexer, latent_vectors
from ulmrec_hf.texts import read_user_texts
from ulmrec_hf.user_index import UserIndex

SMALL = {"codebook_size": 8, "levels": 3, "code_dim": 6, "embedding_dim": 16, "steps": 20, "autoencoder_steps": 10}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_data_stage(folder / "data")
    return index_users(IndexArguments(**SMALL), folder / "data", folder)


def test_every_user_has_an_index_of_their_own(stage):
    index = UserIndex.from_parquet(stage / "user_index.parquet")
    assert len(index) == 60 and index.levels == 3 and index.codebook_size == 8
    report = json.loads((stage / "report.json").read_text())
    assert report["users"] == 60 and report["collisions_after"] == 0 <= report["collisions_before"]
    assert len(report["codes_used"]) == len(report["perplexity"]) == len(report["reconstruction_error"]) == 3
    assert (report["text"], report["users_without_text"], report["encoder"]) == ("reviews", 0, "tfidf")
    assert (stage / "stage.json").is_file()


def test_users_of_one_taste_are_near(stage):
    codes = UserIndex.from_parquet(stage / "user_index.parquet").codes[:, 0]
    tastes = np.arange(60) % len(TASTES)
    same = (tastes[:, None] == tastes) & ~np.eye(60, dtype=bool)
    agree = codes[:, None] == codes
    assert agree[same].mean() > 3 * agree[tastes[:, None] != tastes].mean()


def test_saved_indexer_gives_the_index_again_and_indexes_new_users(stage):
    indexer = UserIndexer.from_pretrained(stage / "indexer").eval()
    encoder = load_encoder(stage / "indexer" / "encoder")
    assert (encoder.name, encoder.dim) == (indexer.encoder_name, indexer.embedding_dim)
    users = read_user_texts(stage.parent / "data")
    ids = [users.of_user(user) for user in range(60)]
    dataset = UserDataset(encoder.encode(users.texts), ids, encoder.encode_user_ids(users.user_ids), 50)
    latents = latent_vectors(indexer, dataset).numpy()
    index = UserIndex.from_parquet(stage / "user_index.parquet")
    free = assign_new(latents[:5], indexer.codebooks.numpy(), index.codes)
    assert not {tuple(row) for row in free.tolist()} & {index[user] for user in index}
    np.testing.assert_array_equal(free[:, 0], index.codes[:5, 0])


@pytest.mark.parametrize("reviews", [True, False])
def test_held_out_interactions_change_no_byte(reviews, tmp_path):
    folders = []
    for other in (False, True):
        data = write_data_stage(tmp_path / str(other) / "data", 40, reviews=reviews, other_held_out=other)
        folders.append(index_users(IndexArguments(**SMALL), data, tmp_path / str(other)))
    files = [
        file.relative_to(folders[0]) for file in folders[0].rglob("*") if file.is_file() and file.name != "stage.json"
    ]
    assert len(files) >= 7
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file


def test_user_without_text_is_told_and_counted(tmp_path, caplog):
    write_data_stage(tmp_path / "data", 20, silent=(3, 4))
    folder = index_users(IndexArguments(**SMALL), tmp_path / "data", tmp_path)
    assert json.loads((folder / "report.json").read_text())["users_without_text"] == 2
    assert "2 users have no text in their train part" in caplog.text
    assert len(UserIndex.from_parquet(folder / "user_index.parquet")) == 20


def test_nan_embeddings(tmp_path, monkeypatch):
    write_data_stage(tmp_path / "data", 20)
    monkeypatch.setattr(
        encoders.TfidfEncoder, "encode", lambda self, texts: np.full((len(texts), 8), np.nan, np.float32)
    )
    with pytest.raises(ValueError, match=r"'tfidf' gave NaN or infinite embeddings for \d+ of \d+ texts"):
        index_users(IndexArguments(**SMALL), tmp_path / "data", tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["data"]  # nothing half-written


def test_codebook_too_small(tmp_path):
    write_data_stage(tmp_path / "data", 20)
    with pytest.raises(ValueError, match="codebook_size must be at least 5"):
        index_users(IndexArguments(codebook_size=4, levels=2), tmp_path / "data", tmp_path)


def test_not_run_again_and_other_settings_refused(stage):
    index, record = stage / "user_index.parquet", (stage / "stage.json").stat().st_mtime_ns
    args = (stage.parent / "data", stage.parent)
    assert index_users(IndexArguments(**SMALL), *args) == stage and (stage / "stage.json").stat().st_mtime_ns == record
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        index_users(IndexArguments(**SMALL, seed=1), *args)
    assert index.is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "both"}, "text is 'both'; it must be one of auto, reviews, titles"),
        ({"preset": "best"}, "preset is 'best'"),
        ({"codebook_size": 0}, "codebook_size is 0; it must be between 1 and 65536"),
        ({"levels": 27}, "levels is 27; it must be between 1 and 26"),
        ({"max_reviews": 0}, "max_reviews is 0; it must be above 0"),
        ({"steps": -1}, "steps is -1; it must be 0 or more"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        IndexArguments(**settings)
