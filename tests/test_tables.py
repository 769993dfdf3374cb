import numpy as np
import pytest

from tests.data_stage import write_data_stage
from ulmrec_hf.tables import LeaveOneOut


def test_reviews_of_the_train_part(tmp_path):
    users = LeaveOneOut.load(write_data_stage(tmp_path, 8)).texts()
    assert users.kind == "reviews" and len(users) == 8
    assert np.diff(users.offsets).tolist() == [3, 4, 5, 6] * 2
    first = [users.texts[text] for text in users.of_user(1)]
    assert len(first) == 4 and all(text.startswith("Fine ") and "cheap kitchen pan" in text for text in first)
    assert [users.texts[text] for text in users.of_user(1, stop=2)] == first[:2]
    assert len(set(users.texts)) == len(users.texts)


def test_titles_where_there_are_no_reviews(tmp_path):
    users = LeaveOneOut.load(write_data_stage(tmp_path, 8, reviews=False)).texts()
    assert users.kind == "titles"
    assert all(users.texts[text].endswith("elegant lamp") for text in users.of_user(2))
    with pytest.raises(ValueError, match="has no review text in its train part: ask for titles"):
        LeaveOneOut.load(tmp_path).texts("reviews")


def test_all_interactions_only_when_asked(tmp_path):
    write_data_stage(tmp_path, 8, other_held_out=True)
    assert not any("zebra" in text for text in LeaveOneOut.load(tmp_path).texts().texts)
    everything = LeaveOneOut.load(tmp_path).texts(train_only=False)
    assert sum("zebra" in everything.texts[text] for text in everything.text_ids) == 16


def test_user_without_text(tmp_path):
    users = LeaveOneOut.load(write_data_stage(tmp_path, 8, silent=(4,))).texts()
    assert len(users.of_user(4)) == 0 and (users.text_ids[users.offsets[4] : users.offsets[5]] == -1).all()


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"interactions\.parquet is missing: run recipes/prepare_data\.py"):
        LeaveOneOut.load(tmp_path).texts()
    with pytest.raises(ValueError, match="auto, reviews or titles; got 'both'"):
        LeaveOneOut.load(write_data_stage(tmp_path, 8)).texts("both")
