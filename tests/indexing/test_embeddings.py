import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.indexing.test_encoder import make_bert, mixed_texts
from tests.small_run import ROOT, launch
from ulmrec_hf.indexing.embeddings import Embeddings, write_embeddings
from ulmrec_hf.indexing.encoder import PretrainedEncoder, TfidfEncoder

TEXTS = mixed_texts(23)
SHARD = 5
SECOND = "embeddings-0000000005-0000000010.safetensors"
LAST = "embeddings-0000000020-0000000023.safetensors"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return PretrainedEncoder(make_bert(tmp_path_factory.mktemp("model") / "bert"))


@pytest.fixture(scope="module")
def whole(encoder, tmp_path_factory):
    """A folder written without interruption."""
    folder = tmp_path_factory.mktemp("embeddings")
    write_embeddings(folder, TEXTS, encoder, shard_texts=SHARD)
    return folder


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows(whole, encoder):
    embeddings = Embeddings(whole)
    assert embeddings.shape == (23, 16)
    expected = np.concatenate([encoder.encode(TEXTS[begin : begin + SHARD]) for begin in range(0, 23, SHARD)])
    for ids in (np.arange(23), np.array([22, 3, 3, 19, 0, 7], np.int32), np.array([], int)):
        rows = embeddings[ids]
        assert rows.dtype == np.float32 and rows.shape == (len(ids), 16)
        np.testing.assert_array_equal(rows, expected[ids])
    np.testing.assert_allclose(expected, encoder.encode(TEXTS), atol=1e-5)
    for ids in ([-1], [0, 23]):
        with pytest.raises(IndexError, match="has the texts 0 to 22"):
            embeddings[np.array(ids)]


def test_only_the_shards_that_are_read_are_opened(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / LAST).unlink()
    embeddings = Embeddings(tmp_path)
    assert embeddings[np.array([19])].shape == (1, 16)
    with pytest.raises(ValueError, match=rf"{LAST} cannot be read.*Run write_embeddings again"):
        embeddings[np.array([20])]


def test_manifest_and_a_stream_of_texts(whole, encoder, tmp_path):
    manifest = json.loads((whole / "embeddings.json").read_text())
    assert manifest["encoder"] == encoder.identity() and (manifest["dim"], manifest["texts"]) == (16, 23)
    assert len(write_embeddings(tmp_path / "a", iter(TEXTS), encoder, shard_texts=SHARD)) == 23
    assert bytes_of(tmp_path / "a") == bytes_of(whole)
    assert write_embeddings(tmp_path / "b", [], encoder)[np.array([], int)].shape == (0, 16)
    other = write_embeddings(tmp_path / "c", TEXTS[::-1], encoder, shard_texts=SHARD)
    assert other[np.array([0])].any() and json.loads((tmp_path / "c" / "embeddings.json").read_text()) != manifest


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(whole, encoder, tmp_path, monkeypatch):
    encode, calls = encoder.encode, []

    def dies_in_the_third_shard(texts):
        calls.append(texts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(texts)

    monkeypatch.setattr(encoder, "encode", dies_in_the_third_shard)
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(tmp_path, TEXTS, encoder, shard_texts=SHARD)
    with pytest.raises(ValueError, match="holds unfinished embeddings"):
        Embeddings(tmp_path)
    assert len(bytes_of(tmp_path)) == 3
    write_embeddings(tmp_path, TEXTS, encoder, shard_texts=SHARD)
    assert calls[3:] == [TEXTS[10:15], TEXTS[15:20], TEXTS[20:]]
    assert bytes_of(tmp_path) == bytes_of(whole)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b"")


def change_a_number(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def drop_a_row(path):
    rewrite(path, lambda rows: rows[1:])


def make_float16(path):
    rewrite(path, lambda rows: rows.astype(np.float16))


def drop_metadata(path):
    save_file(load_file(path), path)


def rewrite(path, change):
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        save_file({"embeddings": change(file.get_tensor("embeddings"))}, path, metadata=file.metadata())


@pytest.mark.parametrize("breaks", [cut, empty, change_a_number, drop_a_row, make_float16, drop_metadata])
def test_a_broken_shard_is_made_again(breaks, whole, encoder, tmp_path, caplog):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    breaks(tmp_path / SECOND)
    write_embeddings(tmp_path, TEXTS, encoder, shard_texts=SHARD)
    assert f"{SECOND} is made again" in caplog.text
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_a_broken_shard_is_not_read(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    cut(tmp_path / SECOND)
    with pytest.raises(ValueError, match=f"{SECOND} cannot be read"):
        Embeddings(tmp_path)[np.array([5])]


def test_other_embeddings_are_refused(whole, encoder, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = bytes_of(tmp_path)
    tfidf = TfidfEncoder(8).fit(TEXTS)
    with pytest.raises(
        ValueError, match=rf'embeddings\.json describes other.*dim was 16, is {tfidf.dim}; .*is "tfidf"'
    ):
        write_embeddings(tmp_path, TEXTS, tfidf, shard_texts=SHARD)
    cls = PretrainedEncoder(encoder.name, "cls")
    with pytest.raises(ValueError, match=r'other embeddings: pooling was "auto", is "cls"\.'):
        write_embeddings(tmp_path, TEXTS, cls, shard_texts=SHARD)
    with pytest.raises(
        ValueError, match=r"other embeddings: shard_texts was 5, is 4096; user_ids was false, is true\."
    ):
        write_embeddings(tmp_path, TEXTS, encoder, user_ids=True)
    with pytest.raises(ValueError, match=f"{SECOND} holds embeddings of other texts or another encoder"):
        write_embeddings(tmp_path, [*TEXTS[:7], "cheap pan", *TEXTS[8:]], encoder, shard_texts=SHARD)
    assert bytes_of(tmp_path) == before

    write_embeddings(tmp_path / "cls", TEXTS, cls, shard_texts=SHARD)
    shutil.copy(tmp_path / "cls" / SECOND, tmp_path / SECOND)
    with pytest.raises(ValueError, match=f"{SECOND} holds embeddings of other texts or another encoder"):
        write_embeddings(tmp_path, TEXTS, encoder, shard_texts=SHARD)
    with pytest.raises(ValueError, match="nowhere holds no embeddings"):
        Embeddings(tmp_path / "nowhere")


def test_nan_names_the_text(encoder, tmp_path, monkeypatch):
    encode = encoder.encode

    def one_nan(texts):
        vectors = encode(texts)
        vectors[[text == TEXTS[7] for text in texts], 3] = np.nan
        return vectors

    monkeypatch.setattr(encoder, "encode", one_nan)
    with pytest.raises(
        ValueError, match=f"gave NaN or infinite embeddings for 1 of 5 texts, the first '{TEXTS[7][:80]}"
    ):
        write_embeddings(tmp_path, TEXTS, encoder, shard_texts=SHARD)
    assert not (tmp_path / SECOND).exists() and len(bytes_of(tmp_path)) == 2


def test_tfidf_and_user_ids(tmp_path):
    encoder, users = TfidfEncoder(8).fit(TEXTS), [f"A{user}" for user in range(9)]
    texts = write_embeddings(tmp_path / "texts", TEXTS, encoder, shard_texts=SHARD)
    np.testing.assert_array_equal(texts[np.arange(23)], encoder.encode(TEXTS))
    ids = write_embeddings(tmp_path / "users", users, encoder, user_ids=True, shard_texts=SHARD)
    np.testing.assert_allclose(ids[np.arange(9)], encoder.encode_user_ids(users), atol=1e-6)


def test_shards_are_dealt_to_the_processes(whole, encoder, tmp_path, monkeypatch):
    encode, calls = encoder.encode, []
    monkeypatch.setattr(encoder, "encode", lambda texts: (calls.append(len(texts)), encode(texts))[1])
    for process, expected in enumerate(([5, 5], [5, 3], [5])):
        calls.clear()
        state = SimpleNamespace(
            num_processes=3, process_index=process, is_main_process=process == 0, wait_for_everyone=lambda: None
        )
        write_embeddings(tmp_path, TEXTS, encoder, shard_texts=SHARD, state=state)
        assert calls == expected
    assert bytes_of(tmp_path) == bytes_of(whole)


SCRIPT = f"""
import sys
from accelerate import PartialState
from tests.indexing.test_encoder import mixed_texts
from ulmrec_hf.indexing.embeddings import write_embeddings
from ulmrec_hf.indexing.encoder import PretrainedEncoder

embeddings = write_embeddings(sys.argv[2], mixed_texts(23), PretrainedEncoder(sys.argv[1]), shard_texts={SHARD})
assert embeddings[range(23)].shape == (23, 16)
sys.stdout.write(f"process {{PartialState().process_index}} of {{PartialState().num_processes}}\\n")  # in one piece
PartialState().destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(whole, encoder, tmp_path):
    script = tmp_path / "encode.py"
    script.write_text(SCRIPT)
    config = str(ROOT / "recipes" / "accelerate" / "cpu_2.yaml")
    launcher = ("-m", "accelerate.commands.launch", "--config_file", config)
    done = launch([str(script), encoder.name, str(tmp_path / "two")], launcher=launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.splitlines()) == ["process 0 of 2", "process 1 of 2"]
    assert bytes_of(tmp_path / "two") == bytes_of(whole)
