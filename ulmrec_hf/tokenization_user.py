"""A tokenizer with one token for each code of a user index."""

import copy
import json
import os
from collections.abc import Iterable
from pathlib import Path

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from .user_index import MAX_LEVELS, user_token, user_tokens

_SETTINGS = "user_index"


class UserTokenizer(TokenizersBackend):
    """A base model's tokenizer plus the user tokens `<a_0>` .. `<d_255>`, one id each.

    Make one with `from_base`. What it saves, plain `AutoTokenizer` loads with the same ids and no remote code;
    `UserTokenizer.from_pretrained` gives this class back. User tokens are no special tokens, so that
    `decode(..., skip_special_tokens=True)` keeps a generated user index. Write an index without inner spaces: a space
    before a user token is a token of its own in some vocabularies.
    """

    # No __init__ here: transformers would rebuild a subclass that has one from its vocabulary and merges, and lose
    # the normalizer and pre-tokenizer of tokenizer.json, so that the ids change.

    @classmethod
    def from_base(
        cls, base: str | os.PathLike | PreTrainedTokenizerBase, levels: int = 4, codebook_size: int = 256, **kwargs
    ) -> "UserTokenizer":
        """Extends a base model's tokenizer; a missing pad token becomes the end token.

        Args:
            base: a hub id, a folder, or a loaded tokenizer. The backend that `AutoTokenizer` gives is the one kept,
                which for Llama-2 is not the one that its tokenizer.json describes.
            levels: codes in a user index, 1 to 26 (one letter a level); 0 adds no user tokens, for an index that is
                spelled as plain text.
            codebook_size: values that a code can take.
            kwargs: of `AutoTokenizer.from_pretrained`, such as `revision`.

        Raises:
            ValueError: the base already holds one of the user tokens (unless it is a UserTokenizer of the same size),
                has no fast backend, or has neither a pad nor an end token; or a size is out of range.
        """
        if not 0 <= levels <= MAX_LEVELS:
            raise ValueError(
                f"levels must be 1 to {MAX_LEVELS} (one letter a level), or 0 for no user tokens; got {levels}."
            )
        if codebook_size < 1:
            raise ValueError(f"codebook_size must be at least 1, got {codebook_size}.")
        if isinstance(base, str | os.PathLike):
            base = AutoTokenizer.from_pretrained(base, **kwargs)
        settings = {"levels": levels, "codebook_size": codebook_size}
        tokens = [token for level in user_tokens(levels, codebook_size) for token in level]
        _check_base(base, settings, tokens)
        special = dict(base.special_tokens_map)
        if special.get("pad_token") is None:
            special["pad_token"] = special["eos_token"]  # labels are masked by position, never by the pad id
        backend = copy.deepcopy(base.backend_tokenizer)
        backend.no_truncation()  # an earlier call of the base may have left them on, and they would be saved
        backend.no_padding()
        # base.init_kwargs as a whole would carry loading options such as local_files_only into the saved config
        tokenizer = cls(
            tokenizer_object=backend,
            padding_side=base.padding_side,
            truncation_side=base.truncation_side,
            model_max_length=base.model_max_length,
            **({"extra_special_tokens": list(base.extra_special_tokens)} if base.extra_special_tokens else {}),
            **({"chat_template": base.chat_template} if base.chat_template else {}),
            **{_SETTINGS: settings},
            **special,
        )
        tokenizer.name_or_path = base.name_or_path
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
        return tokenizer

    @property
    def levels(self) -> int:
        """Codes in a user index that are user tokens; 0 where it has none."""
        return self._settings["levels"]

    @property
    def codebook_size(self) -> int:
        """Values that a code can take."""
        return self._settings["codebook_size"]

    @property
    def user_token_ids(self) -> list[list[int]]:
        """Token ids [levels][codebook_size]."""
        return [self.convert_tokens_to_ids(level) for level in user_tokens(self.levels, self.codebook_size)]

    def encode_user(self, codes: Iterable[int]) -> list[int]:
        """The token ids of a user index, one a level.

        Raises:
            ValueError: the number of codes or one of them is out of range.
        """
        codes = [int(code) for code in codes]
        if len(codes) != self.levels or not all(0 <= code < self.codebook_size for code in codes):
            raise ValueError(
                f"A user index has {self.levels} codes of 0 to {self.codebook_size - 1}, but {codes} were given."
            )
        return self.convert_tokens_to_ids([user_token(level, code) for level, code in enumerate(codes)])

    def decode_user(self, ids: Iterable[int]) -> tuple[int, ...]:
        """The inverse of `encode_user`.

        Raises:
            ValueError: the ids are not one user token of each level in order.
        """
        ids = [int(token_id) for token_id in ids]
        try:
            return tuple(level.index(token_id) for level, token_id in zip(self.user_token_ids, ids, strict=True))
        except ValueError:
            raise ValueError(
                f"The ids {ids} are the tokens {self.convert_ids_to_tokens(ids)}, not one user token of each of the "
                f"{self.levels} levels."
            ) from None

    @property
    def _settings(self) -> dict[str, int]:
        settings = self.init_kwargs.get(_SETTINGS)
        if settings is None:
            raise ValueError(
                f"The tokenizer {self.name_or_path!r} holds no user tokens; make one by UserTokenizer.from_base."
            )
        return settings

    def _save_pretrained(self, save_directory, file_names, *args, **kwargs):
        # Runs after tokenizer_config.json is written and before anything is pushed to the hub. The class named there
        # must be one that transformers has, so that loading needs neither this package nor a fallback.
        config = Path(file_names[0])
        saved = json.loads(config.read_text(encoding="utf-8"))
        saved["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.write_text(json.dumps(saved, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, *args, **kwargs)


def _check_base(base: PreTrainedTokenizerBase, settings: dict[str, int], tokens: list[str]) -> None:
    """Raises a ValueError where the base cannot be extended by these tokens."""
    name = getattr(base, "name_or_path", "") or type(base).__name__
    if getattr(base, "backend_tokenizer", None) is None:
        raise ValueError(f"The tokenizer {name!r} has no fast (tokenizers) backend; choose a base model that has.")
    held = base.init_kwargs.get(_SETTINGS)
    if held is not None and dict(held) != settings:
        raise ValueError(
            f"The tokenizer {name!r} already holds user tokens of {held['levels']} levels x "
            f"{held['codebook_size']} codes, but {settings['levels']} x {settings['codebook_size']} are asked for: "
            "use those sizes, or start from the base model's own tokenizer."
        )
    vocabulary = base.get_vocab()
    taken = [token for token in tokens if token in vocabulary]
    if held is None and taken:
        raise ValueError(
            f"The tokenizer {name!r} already holds the token {taken[0]}, which is to stand for a user's code "
            f"({len(taken)} of {len(tokens)} such tokens are taken): choose another base model."
        )
    if base.pad_token is None and base.eos_token is None:
        raise ValueError(f"The tokenizer {name!r} has neither a pad nor an end token: set one of them.")
