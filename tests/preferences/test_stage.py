import pyarrow.parquet as pq
import pytest

from tests.data_stage import TASTES, data_tables, write_data_stage
from ulmrec_hf.preferences import base
from ulmrec_hf.preferences.arguments import PreferenceArguments
from ulmrec_hf.preferences.base import EXTRACTORS, PreferenceExtractor
from ulmrec_hf.preferences.key_phrases import KeyPhrases
from ulmrec_hf.preferences.stage import extract_preferences
from ulmrec_hf.tables import PREFERENCES, LeaveOneOut

USERS = 12


def run(folder, other=False, reviews=True, silent=(), **settings):
    data = folder / "data"
    if not data.is_dir():
        write_data_stage(data, USERS, reviews=reviews, other_held_out=other, silent=silent)
    stage = extract_preferences(PreferenceArguments(**settings), LeaveOneOut.load(data), folder)
    return pq.read_table(stage / "preferences.parquet")


def test_a_row_for_every_position(tmp_path):
    table = run(tmp_path)
    assert table.schema.equals(PREFERENCES)
    positions = {}
    for row in table.to_pylist():
        positions.setdefault(row["user"], []).append(row["position"])
        assert row["user_id"] == f"user{row['user']:04d}"
        assert (row["evidence"], row["extractor"], row["model"], row["prompt_hash"]) == (
            "train",
            "key_phrases",
            None,
            None,
        )
        if row["position"] >= 2:  # enough said to tell the taste
            assert set(TASTES[row["user"] % 4]) & set(row["preference"].replace(",", "").split())
    assert positions == {user: list(range(1, 3 + user % 4 + 1)) for user in range(USERS)}


def test_a_row_is_made_from_what_came_before(tmp_path):
    rows = {(row["user"], row["position"]): row["preference"] for row in run(tmp_path).to_pylist()}
    users = LeaveOneOut.load(tmp_path / "data").texts()
    extractor = KeyPhrases().fit([users.texts[text] for text in users.text_ids])
    for (user, position), preference in rows.items():
        before = [users.texts[text] for text in users.of_user(user)[:position]]
        assert extractor.describe([before]) == [preference]


def test_train_positions(tmp_path):
    table = run(tmp_path, train_positions=2)
    assert [row["position"] for row in table.to_pylist() if row["user"] == 3] == [4, 5, 6]
    assert [row["position"] for row in table.to_pylist() if row["user"] == 0] == [1, 2, 3]


def test_held_out_interactions_change_no_byte(tmp_path):
    for reviews in (True, False):
        folders = [tmp_path / f"{reviews}{other}" for other in (False, True)]
        tables = [run(folder, other, reviews=reviews) for folder, other in zip(folders, (False, True), strict=True)]
        assert tables[0].equals(tables[1])
        first, second = ((folder / "preferences" / "preferences.parquet").read_bytes() for folder in folders)
        assert first == second


def test_all_evidence_is_named_so_and_one_text(tmp_path):
    write_data_stage(tmp_path / "data", USERS)  # titles and reviews of the test target are shown to the extractor
    rows = run(tmp_path, evidence="all").to_pylist()
    assert {row["evidence"] for row in rows} == {"all"}
    users = LeaveOneOut.load(tmp_path / "data").texts()
    extractor = KeyPhrases().fit([users.texts[text] for text in users.text_ids])
    everything = LeaveOneOut.load(tmp_path / "data").texts(train_only=False)
    for row in rows:
        said = [everything.texts[text] for text in everything.of_user(row["user"])]
        assert extractor.describe([said]) == [row["preference"]]


def test_user_without_words_is_logged_and_counted(tmp_path, caplog):
    rows = run(tmp_path, silent=(0,)).to_pylist()
    assert [row["preference"] for row in rows if row["user"] == 0] == ["(none)"] * 3
    assert "3 preferences are (none)" in caplog.text
    assert all(row["preference"] for row in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extractor": "oracle"}, "extractor is 'oracle'; it must be one of key_phrases"),
        ({"num_phrases": 0}, "num_phrases is 0"),
        ({"train_positions": -1}, "train_positions is -1"),
        ({"evidence": "test"}, "evidence is 'test'; it must be one of train, all"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceArguments(**settings)


@pytest.mark.parametrize("settings", [{}, {"train_positions": 2}, {"evidence": "all"}])
def test_memory_gives_what_the_folder_holds(tmp_path, settings, monkeypatch):
    table = run(tmp_path, **settings)
    monkeypatch.setattr(base, "_BATCH", 7)
    assert KeyPhrases().extract(LeaveOneOut(data_tables(USERS)), **settings).equals(table)


def test_bad_rows():
    for settings, message in (({"evidence": "test"}, "evidence is 'test'"), ({"train_positions": -1}, "train_posi")):
        with pytest.raises(ValueError, match=message):
            KeyPhrases().extract(LeaveOneOut(data_tables(USERS)), **settings)


def test_a_fitted_extractor_is_not_fitted_again():
    data = LeaveOneOut(data_tables(USERS))
    other = KeyPhrases(num_phrases=1).fit(["a garden"])
    assert set(other.extract(data)["preference"].to_pylist()) == {"garden", "(none)"}


def test_an_extractor_from_outside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(EXTRACTORS, "_entries", dict(EXTRACTORS._entries))  # so that no other test finds it

    @EXTRACTORS.register("longest_word")
    class LongestWord(PreferenceExtractor):
        name = "longest_word"

        def describe(self, texts_per_user):
            words = [" ".join(texts).split() for texts in texts_per_user]
            return [max(each, key=len, default=base.NO_PREFERENCE) for each in words]

    table = run(tmp_path, extractor="longest_word")
    assert set(table["extractor"].to_pylist()) == {"longest_word"}
    assert table["preference"].to_pylist()[0] == "camping"
    assert LongestWord().extract(LeaveOneOut(data_tables(USERS))).equals(table)
