"""Recommender: equal to the stages' own results, for known users and new ones, from a folder that was moved."""

import json
import logging
import shutil

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.small_run import load_recipe
from ulmrec_hf import Recommender
from ulmrec_hf.recommender import Fusion, Request
from ulmrec_hf.user_index import EarlierCodes, UserIndex


@pytest.fixture(scope="module")
def folder(run_folder, tmp_path_factory):
    """The small run's `model/`, alone in another place."""
    return shutil.copytree(run_folder / "model", tmp_path_factory.mktemp("moved") / "model")


@pytest.fixture(scope="module")
def recommender(folder):
    return Recommender.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def test_requests(recommender):
    """Every user as in the test split: with all but the newest item."""
    data = recommender.data
    return [
        Request(user, [data.item_ids[item - 1] for item in data.sequences[row][:-1]])
        for row, user in enumerate(data.user_ids)
    ]


def test_it_gives_what_the_stages_gave(recommender, test_requests, run_folder):
    results = list(recommender.recommend_many(test_requests, 20, progress=False))
    table = pq.read_table(run_folder / "retriever" / "candidates.parquet").filter(pc.field("split") == "test")
    candidates = {row["user"]: row for row in table.to_pylist()}
    table = pq.read_table(run_folder / "model" / "predictions.parquet")
    kept = (pc.field("split") == "test") & (pc.field("system") == "ulmrec")
    predictions = {row["user"]: row["scores"] for row in table.filter(kept).to_pylist()}
    assert len(results) == len(candidates) == len(predictions) > 100
    for user, rows in enumerate(results):
        offered = [recommender.data.item_ids[item - 1] for item in candidates[user]["items"]]
        letters = np.array(predictions[user])
        assert sorted(row["item_id"] for row in rows) == sorted(offered)
        ordered = letters[[offered.index(row["item_id"]) for row in rows]]
        assert (np.diff(ordered) < 1e-4).all()  # letters that are closer may change places with the batches
        scores = {row["item_id"]: row for row in rows}
        assert [scores[item]["ranker_score"] for item in offered] == pytest.approx(letters.tolist(), abs=1e-4)
        assert [scores[item]["retriever_score"] for item in offered] == candidates[user]["scores"]


def test_one_user_gets_titles_ids_and_scores_and_nothing_seen(recommender):
    user = recommender.data.user_ids[3]
    rows = recommender.recommend(user, k=5)
    assert len(rows) == 5 and list(rows[0]) == ["item_id", "title", "score", "ranker_score", "retriever_score"]
    titles = dict(zip(recommender.data.item_ids, recommender.data.titles, strict=True))
    assert all(titles[row["item_id"]] == row["title"] for row in rows)
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    seen = {recommender.data.item_ids[item - 1] for item in recommender.data.sequences[3]}
    assert not seen & {row["item_id"] for row in recommender.recommend(user, k=20)}
    assert next(recommender.recommend_many([user], 5, progress=False)) == rows
    assert next(recommender.recommend_many([{"user_id": user}], 5, progress=False)) == rows


def test_titles_serve_as_a_history(recommender):
    items = recommender.data.item_ids[:2]
    by_id = recommender.recommend(history=items, k=3)
    assert recommender.recommend(history=recommender.data.titles[:2], k=3) == by_id


def test_somebody_new_is_indexed_by_what_they_wrote(recommender):
    history = recommender.data.titles[:1]
    users = [
        recommender.recommend(history=history, reviews=[f"Anything {style} wins me over."], k=20)
        for style in ("ocean", "budget")
    ]
    assert {row["item_id"] for row in users[0]} == {row["item_id"] for row in users[1]}
    scores = [{row["item_id"]: row["ranker_score"] for row in rows} for rows in users]
    assert scores[0] != scores[1]  # the same history and candidates: only the index differs
    assert len(recommender.users) == len(recommender.data)  # nobody was added


def test_an_unknown_user_is_logged_once(recommender, caplog):
    with caplog.at_level(logging.WARNING):
        for name in ("nobody", "nobody else"):
            assert len(recommender.recommend(name, history=["a thing that is not in the catalogue"], k=2)) == 2
    assert sum("no user index" in record.message for record in caplog.records) == 1
    assert sum("not in the catalogue" in record.message for record in caplog.records) == 1


def test_fusion_weighs_both_scores(recommender):
    user = recommender.data.user_ids[0]
    parts = (recommender.data, recommender.retriever, recommender.ranker)
    retrieved = Recommender(*parts, fusion=Fusion(0.0, 1.0)).recommend(user, k=20)
    assert [row["retriever_score"] for row in retrieved] == sorted(
        (row["retriever_score"] for row in retrieved), reverse=True
    )
    assert np.exp([row["score"] for row in retrieved]).sum() == pytest.approx(1)
    ranked = {row["item_id"]: row["score"] for row in recommender.recommend(user, k=20)}
    for row in Recommender(*parts, fusion=Fusion(2.0, 3.0)).recommend(user, k=20):
        alone = next(other["score"] for other in retrieved if other["item_id"] == row["item_id"])
        assert row["score"] == pytest.approx(2 * ranked[row["item_id"]] + 3 * alone)


def test_what_is_saved_recommends_the_same(recommender, tmp_path):
    user = recommender.data.user_ids[7]
    recommender.save_pretrained(tmp_path / "saved")
    again = Recommender.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.recommend(user) == recommender.recommend(user)
    assert again.recommend(reviews=["Only neon."]) == recommender.recommend(reviews=["Only neon."])
    recommender.save_pretrained(tmp_path / "nobody", user_map=False)
    assert user.encode() not in b"".join(path.read_bytes() for path in (tmp_path / "nobody").glob("*.parquet"))
    nobody = Recommender.from_pretrained(tmp_path / "nobody", device="cpu")
    assert len(nobody.data) == 0 and len(nobody.recommend(history=recommender.data.titles[:2])) == 10


def test_the_recipe_writes_every_user_or_a_file_of_requests(folder, recommender, tmp_path, capsys):
    recipe = load_recipe("recommend")
    output = tmp_path / "all.parquet"
    recipe.main(["--model", str(folder), "--output_file", str(output), "--k", "3"])
    rows = pq.read_table(output).to_pylist()
    assert [row["user_id"] for row in rows] == recommender.data.user_ids
    expected = recommender.recommend(rows[5]["user_id"], k=3)
    assert rows[5]["item_ids"] == [row["item_id"] for row in expected]
    assert rows[5]["titles"] == [row["title"] for row in expected]
    assert str(output) in capsys.readouterr().out

    requests = tmp_path / "requests.jsonl"
    asked = [
        {"user_id": rows[5]["user_id"], "reviews": None},
        {"history": [recommender.data.titles[0]], "reviews": ["Only neon."]},
    ]
    requests.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    recipe.main(["--model", str(folder), "--requests", str(requests), "--output_file", str(output), "--k", "3"])
    written = pq.read_table(output).to_pylist()
    assert written[0]["item_ids"] == rows[5]["item_ids"] and written[1]["user_id"] is None
    for line, message in (('{"user": "x"}', "a request has no user"), ('{"user_id": 7}', "user ids are strings")):
        requests.write_text(f"\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=rf"requests.jsonl:2: {message}"):
            recipe.main(["--model", str(folder), "--requests", str(requests), "--output_file", str(output)])
    requests.write_text('{"user_id": "x"}\nnot json\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"requests.jsonl:2: not JSON"):
        recipe.main(["--model", str(folder), "--requests", str(requests), "--output_file", str(output)])
    assert pq.read_table(output).to_pylist() == written  # the old file stays whole


BAD_REQUESTS = [
    ({"k": 0}, "k is 0; it must be a whole number of 1 to 20"),
    ({"k": 21}, "k is 21"),
    ({"k": 2.0}, "k is 2.0"),
    ({"history": "ocean tent"}, "history is the string 'ocean tent'; it must be a list"),
    ({"reviews": "nice"}, "reviews is the string 'nice'"),
    ({"user_id": 7}, "user ids are strings, '7' for example; got 7"),
]


@pytest.mark.parametrize(("request_", "text"), BAD_REQUESTS)
def test_bad_requests(recommender, request_, text):
    with pytest.raises(ValueError, match=text):
        recommender.recommend(**request_)


def test_one_request_in_place_of_many_is_an_error(recommender):
    for one in ("user-001", {"user_id": "user-001"}, Request("user-001")):
        with pytest.raises(ValueError, match="give a list of them, or call recommend"):
            next(recommender.recommend_many(one, progress=False))


def test_nothing_of_an_earlier_save_stays(recommender, tmp_path, monkeypatch):
    users = recommender.users
    made = UserIndex(
        users.user_ids, users.codes, users.codebook_size, earlier=EarlierCodes(np.arange(len(users) + 1), users.codes)
    )
    monkeypatch.setattr(recommender.ranker, "user_index", made)
    recommender.save_pretrained(tmp_path)
    assert UserIndex.from_parquet(tmp_path / "user_index.parquet").earlier is None  # only training rows spell them
    recommender.save_pretrained(tmp_path, user_map=False)
    assert not (tmp_path / "user_index.parquet").exists() and not (tmp_path / "sequences.parquet").exists()


def test_somebody_new_is_nobody_elses_number(recommender):
    users = UserIndex(recommender.users.user_ids, recommender.users.codes, recommender.users.codebook_size, "number")
    parts = (recommender.data, recommender.retriever, recommender.ranker)
    numbered = Recommender(*parts, users, recommender.indexer)
    asker = numbered._look_up(Request(reviews=["Only neon."]))
    assert asker.index.spell(asker.user_id) == str(len(users))


def test_a_history_may_be_any_iterable_or_hold_everything(recommender):
    items = recommender.data.item_ids
    assert recommender.recommend(history=iter(items[:2]), reviews=None, k=np.int64(3)) == recommender.recommend(
        history=items[:2], k=3
    )
    assert recommender.recommend(history=items) == []


def test_a_request_of_other_fields_is_an_error(recommender):
    with pytest.raises(ValueError, match="a request has no items; it has user_id, history and reviews"):
        next(recommender.recommend_many([{"items": []}], progress=False))
