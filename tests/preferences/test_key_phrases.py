import pytest

from ulmrec_hf.preferences.key_phrases import KeyPhrases

TEXTS = ["A sturdy tent, sturdy and light.", "A cheap pan for the kitchen.", "The tent is cheap.", "Nice garden lamp"]


def test_best_phrases_first():
    extractor = KeyPhrases(num_phrases=2).fit(TEXTS)
    (preference,) = extractor.describe([[TEXTS[0], "sturdy tent again"]])
    assert preference == "sturdy, sturdy tent"


def test_phrases_add_words_and_keep_to_the_number():
    for count in (1, 3, 6):
        (preference,) = KeyPhrases(count).fit(TEXTS).describe([TEXTS])
        phrases = preference.split(", ")
        assert len(phrases) <= count
        seen = set()
        for phrase in phrases:
            assert not set(phrase.split()) <= seen
            seen |= set(phrase.split())


def test_each_user_on_their_own():
    extractor = KeyPhrases().fit(TEXTS)
    together = extractor.describe([[TEXTS[1]], [TEXTS[3], TEXTS[1]], [TEXTS[1]]])
    assert together == [extractor.describe([[TEXTS[1]]])[0], extractor.describe([[TEXTS[3], TEXTS[1]]])[0], together[0]]
    assert "garden" in together[1] and "garden" not in together[0]


def test_nothing_said():
    extractor = KeyPhrases().fit(TEXTS)
    assert extractor.describe([[], ["the and of"], ["unheard"], [TEXTS[3]]])[:3] == ["(none)"] * 3
    assert extractor.describe([[]]) == ["(none)"] and extractor.describe([]) == []


def test_a_phrase_must_recur_in_a_larger_corpus():
    texts = [f"tent number{number}" for number in range(300)]
    assert KeyPhrases().fit(texts).describe([[texts[0]]]) == ["tent"]


def test_at_least_one_phrase():
    with pytest.raises(ValueError, match="num_phrases is 0; it must be at least 1"):
        KeyPhrases(num_phrases=0)
