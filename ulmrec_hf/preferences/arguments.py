"""Settings of the preferences, for YAML and the command line."""

from dataclasses import dataclass

from ..protocol import EVIDENCE
from ..registry import Registry
from ..stages import check_types, setting

EXTRACTORS = Registry("extractor", key_phrases="ulmrec_hf.preferences.key_phrases:KeyPhrases")


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


def check_rows(train_positions: int, evidence: str) -> None:
    """Raises ValueError where `PreferenceExtractor.extract` cannot use its settings."""
    if train_positions < 0:
        raise ValueError(f"train_positions is {train_positions}; it must be 0 (all) or more.")
    if evidence not in EVIDENCE:
        raise ValueError(f"evidence is {evidence!r}; it must be one of {', '.join(EVIDENCE)}.")
