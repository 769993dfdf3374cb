"""Settings of the preferences, for YAML and the command line."""

from dataclasses import dataclass

from ..stages import check_types, setting
from .base import EXTRACTORS, check_rows


@dataclass
class PreferenceArguments:
    """How a user's preference is extracted.

    Raises:
        ValueError: a setting has a value that cannot be used; the message names the setting.
    """

    extractor: str = setting("key_phrases", "key_phrases: the most telling words and word pairs by TF-IDF.")
    num_phrases: int = setting(6, "Phrases in a preference at most.")
    train_positions: int = setting(
        0,
        "For how many of a user's newest training targets a preference is made from what came before them, besides "
        "the one from the whole train part; 0 = for all of them.",
    )
    evidence: str = setting(
        "train",
        "train: only the train part before the target. all: every interaction, the test target included, as the paper "
        "did; such results are leaky and are reported as such.",
    )

    def __post_init__(self):
        check_types(self)
        EXTRACTORS.check(self.extractor)
        if self.num_phrases < 1:
            raise ValueError(f"num_phrases is {self.num_phrases}; it must be at least 1.")
        check_rows(self.train_positions, self.evidence)
