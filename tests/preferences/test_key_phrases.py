from ulmrec_hf.preferences.key_phrases import KeyPhraseExtractor

TEXTS = ["A sturdy tent, sturdy and light.", "A cheap pan for the kitchen.", "The tent is cheap.", "Nice garden lamp"]


def test_best_phrases_first():
    extractor = KeyPhraseExtractor(num_phrases=2).fit(TEXTS)
    (preference,) = extractor.extract([[TEXTS[0], "sturdy tent again"]])
    assert preference == "sturdy, sturdy tent"


def test_phrases_add_words_and_keep_to_the_number():
    for count in (1, 3, 6):
        (preference,) = KeyPhraseExtractor(count).fit(TEXTS).extract([TEXTS])
        phrases = preference.split(", ")
        assert len(phrases) <= count
        seen = set()
        for phrase in phrases:
            assert not set(phrase.split()) <= seen
            seen |= set(phrase.split())


def test_each_user_on_their_own():
    extractor = KeyPhraseExtractor().fit(TEXTS)
    together = extractor.extract([[TEXTS[1]], [TEXTS[3], TEXTS[1]], [TEXTS[1]]])
    assert together == [extractor.extract([[TEXTS[1]]])[0], extractor.extract([[TEXTS[3], TEXTS[1]]])[0], together[0]]
    assert "garden" in together[1] and "garden" not in together[0]


def test_nothing_said():
    extractor = KeyPhraseExtractor().fit(TEXTS)
    assert extractor.extract([[], ["the and of"], ["unheard"], [TEXTS[3]]])[:3] == ["(none)"] * 3
    assert extractor.extract([[]]) == ["(none)"] and extractor.extract([]) == []


def test_a_phrase_must_recur_in_a_larger_corpus():
    texts = [f"tent number{number}" for number in range(300)]
    assert KeyPhraseExtractor().fit(texts).extract([[texts[0]]]) == ["tent"]
