"""UserTokenizer: new ids, exact round trips, and loading without the package."""

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from tests.byte_bpe import byte_bpe
from ulmrec_hf.tokenization_user import UserTokenizer

TEXTS = [
    "### Answer:\nA",
    "<a_1><b_2><c_3><d_4>\n### History:\n- a red tent",
    "who is <a_1><b_2><c_0><d_7> then",
    "naïve café 漢字 🙂\n\n  two  spaces",
    "user <a_0>, item <d_7>.",
]
FRESH_PROCESS = """
import json, sys
sys.modules["ulmrec_hf"] = None  # importing it fails from here on
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert not any(name.startswith("ulmrec_hf.") for name in sys.modules)
texts = json.loads(sys.argv[2])
print(json.dumps({"ids": [tokenizer(text)["input_ids"] for text in texts], "size": len(tokenizer),
                  "pad": tokenizer.pad_token, "side": tokenizer.padding_side}))
"""


@pytest.fixture(scope="session")
def byte_level_base() -> PreTrainedTokenizerFast:
    corpus = ["a red tent", "### Answer: history user item", *TEXTS[:1]]
    return byte_bpe(corpus, vocab_size=400, end="<|end|>")


@pytest.fixture(scope="session")
def llama_base(shared):
    return AutoTokenizer.from_pretrained(shared / "models" / "llama2_tokenizer")


@pytest.fixture(params=["byte_level_base", pytest.param("llama_base", marks=pytest.mark.data)])
def base(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokenizer(base) -> UserTokenizer:
    return UserTokenizer.from_base(base, levels=4, codebook_size=8)


def test_user_tokens_get_the_next_ids(base, tokenizer):
    ids = [token_id for level in tokenizer.user_token_ids for token_id in level]
    assert ids == list(range(len(base), len(base) + 32))
    assert [len(level) for level in tokenizer.user_token_ids] == [8] * 4
    assert tokenizer("<d_7>", add_special_tokens=False)["input_ids"] == [len(base) + 31]


def test_the_default_size_is_the_papers(byte_level_base):
    tokenizer = UserTokenizer.from_base(byte_level_base)
    assert (tokenizer.levels, tokenizer.codebook_size) == (4, 256)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode_user([0, 255, 1, 255])) == [
        "<a_0>",
        "<b_255>",
        "<c_1>",
        "<d_255>",
    ]


def test_text_without_user_tokens_keeps_the_ids_that_autotokenizer_gives(base, tokenizer):
    for text in ("### Answer:\nA", " A", "naïve café 漢字 🙂", "two  spaces\n\nand lines"):
        assert tokenizer(text)["input_ids"] == base(text)["input_ids"]


def test_the_base_stays_as_it_was(base, tokenizer):
    assert "<a_0>" not in base.get_vocab()
    assert len(tokenizer) == len(base) + 32


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_is_exact(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_skip_special_tokens_keeps_user_tokens(tokenizer):
    ids = [*tokenizer.encode_user([1, 2, 3, 4]), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<a_1><b_2><c_3><d_4>"
    assert not any(token.startswith("<a_") for token in tokenizer.all_special_tokens)


def test_encode_and_decode_user_are_inverse(tokenizer):
    ids = tokenizer.encode_user((7, 0, 3, 1))
    assert ids == tokenizer("<a_7><b_0><c_3><d_1>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode_user(ids) == (7, 0, 3, 1)


@pytest.mark.parametrize("codes", [(1, 2, 3), (1, 2, 3, 8), (-1, 0, 0, 0)])
def test_encode_user_refuses_wrong_codes(tokenizer, codes):
    with pytest.raises(ValueError, match="4 codes of 0 to 7"):
        tokenizer.encode_user(codes)


def test_decode_user_refuses_other_tokens(tokenizer):
    ids = tokenizer.encode_user((7, 0, 3, 1))
    with pytest.raises(ValueError, match="not one user token of each of the 4 levels"):
        tokenizer.decode_user([ids[1], ids[0], *ids[2:]])
    with pytest.raises(ValueError, match="not one user token"):
        tokenizer.decode_user([*ids[:3], 5])


def test_a_missing_pad_token_becomes_the_end_token(byte_level_base):
    tokenizer = UserTokenizer.from_base(byte_level_base, codebook_size=2)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|end|>"
    assert byte_level_base.pad_token is None


@pytest.mark.data
def test_a_pad_token_is_kept(llama_base):
    assert UserTokenizer.from_base(llama_base, codebook_size=2).pad_token == llama_base.pad_token == "<unk>"


def test_plain_autotokenizer_loads_the_same_ids_in_a_fresh_process(tokenizer, tmp_path):
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    # a model's config beside it must not make AutoTokenizer choose the Llama class, which has other ids
    LlamaConfig().save_pretrained(tmp_path)
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert loaded == {
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "size": len(tokenizer),
        "pad": tokenizer.pad_token,
        "side": "left",
    }


def test_what_is_saved_names_a_transformers_class_and_no_code(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["user_index"] == {"levels": 4, "codebook_size": 8}
    assert not {"auto_map", "local_files_only", "is_local", "name_or_path"} & set(config)


def test_push_to_hub_uploads_the_corrected_config(tokenizer, tmp_path, monkeypatch):
    seen = {}

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

    def upload(self, folder, repo_id, files_timestamps, **kwargs):
        config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
        seen.update(repo_id=repo_id, tokenizer_class=config["tokenizer_class"])

    monkeypatch.setattr("transformers.tokenization_utils_base.hf_api", Hub)
    monkeypatch.setattr(UserTokenizer, "_upload_modified_files", upload)
    tokenizer.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/tokenizer")
    assert seen == {"repo_id": "me/tokenizer", "tokenizer_class": "PreTrainedTokenizerFast"}


def test_our_own_saved_tokenizer_comes_back_as_user_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "first")
    plain = AutoTokenizer.from_pretrained(tmp_path / "first")
    again = [
        UserTokenizer.from_pretrained(tmp_path / "first"),
        UserTokenizer.from_base(tmp_path / "first", levels=4, codebook_size=8),
        UserTokenizer.from_base(plain, levels=4, codebook_size=8),
        UserTokenizer.from_base(tokenizer, levels=4, codebook_size=8),
    ]
    for other in again:
        assert type(other) is UserTokenizer
        assert len(other) == len(tokenizer)
        assert other.user_token_ids == tokenizer.user_token_ids
        assert [other(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    again[1].save_pretrained(tmp_path / "second")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_saved_tokenizer_of_another_size_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="4 levels x 8 codes, but 4 x 16 are asked for"):
        UserTokenizer.from_base(tmp_path, levels=4, codebook_size=16)


def test_a_base_that_holds_a_user_token_is_refused(byte_level_base, tmp_path):
    byte_level_base.save_pretrained(tmp_path)
    foreign = AutoTokenizer.from_pretrained(tmp_path)
    foreign.add_tokens(["<a_0>"])
    with pytest.raises(ValueError, match=r"already holds the token <a_0>.*1 of 32"):
        UserTokenizer.from_base(foreign, levels=4, codebook_size=8)


def test_sizes_out_of_range_are_refused(byte_level_base):
    assert UserTokenizer.from_base(byte_level_base, levels=26, codebook_size=1).encode_user([0] * 26)
    with pytest.raises(ValueError, match="levels must be 1 to 26"):
        UserTokenizer.from_base(byte_level_base, levels=27)
    with pytest.raises(ValueError, match="codebook_size must be at least 1"):
        UserTokenizer.from_base(byte_level_base, codebook_size=0)


def test_a_plain_tokenizer_read_as_user_tokenizer_says_what_is_missing(byte_level_base, tmp_path):
    byte_level_base.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no user tokens; make one by UserTokenizer\.from_base"):
        UserTokenizer.from_pretrained(tmp_path).user_token_ids  # noqa: B018


def test_truncation_left_on_by_an_earlier_call_is_not_saved(byte_level_base):
    byte_level_base("a red tent a red tent", truncation=True, max_length=2)
    tokenizer = UserTokenizer.from_base(byte_level_base, codebook_size=2)
    assert tokenizer.backend_tokenizer.truncation is None
    assert len(tokenizer("a red tent a red tent")["input_ids"]) > 2
