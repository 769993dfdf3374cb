"""All settings of a run of the main job."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trl import ModelConfig

from .data.arguments import DataArguments
from .indexing.arguments import IndexArguments
from .preferences.arguments import PreferenceArguments
from .retrieval.arguments import RetrieverArguments
from .stages import check_types, setting
from .systems import ABLATIONS, System
from .tasks.arguments import TaskArguments
from .tasks.records import TASKS
from .trainer import ULMRecTrainingArguments
from .user_index import KINDS

USER_TOKEN_STARTS = ("preferences", "random")


@dataclass
class PipelineArguments:
    """How the stages are put together.

    Raises:
        ValueError: a setting has a value that cannot be used; the message names the setting.
    """

    retriever_config: str | None = setting(None, "YAML of the retriever; default: LRURec.")
    preference_config: str | None = setting(None, "YAML of the preference extraction; default: key phrases.")
    index_config: str | None = setting(None, "YAML of the user indexing; default: its defaults.")
    ablations: list[str] = field(
        default_factory=list,
        metadata={
            "help": "More systems for the report: "
            + ", ".join(f"{name} ({system.help})" for name, system in ABLATIONS.items())
            + "."
        },
    )
    validation_users: int = setting(0, "Users whose validation chooses the best model while tuning; 0 = all.")
    user_token_start: str = setting(
        "preferences",
        "Where the rows of the user tokens start: preferences (the words of the users of each code) or random.",
        choices=list(USER_TOKEN_STARTS),
    )
    save_merged: bool = setting(False, "Also write model/merged, the adapter merged into its base.")
    save_base: bool | None = setting(
        None, "Write model/base, the base with user tokens. Default: yes for a folder, no for a hub id."
    )
    save_user_map: bool = setting(
        True, "Put the users' ids with their indices and histories beside the model; ids are personal data."
    )
    fusion_ranker: float = setting(1.0, "Weight of the ranker's log-probabilities in a recommendation's score.")
    fusion_retriever: float = setting(0.0, "Weight of the retriever's log-probabilities in a recommendation's score.")
    prepare_only: bool = setting(False, "Stop before the tuning.")
    overwrite: bool = setting(False, "Run again what was made with other settings, instead of refusing.")

    def __post_init__(self):
        check_types(self)
        unknown = sorted(set(self.ablations) - set(ABLATIONS))
        if unknown:
            raise ValueError(f"ablations holds {', '.join(unknown)}; known are {', '.join(ABLATIONS)}.")
        if self.user_token_start not in USER_TOKEN_STARTS:
            raise ValueError(
                f"user_token_start is {self.user_token_start!r}; it must be one of {', '.join(USER_TOKEN_STARTS)}."
            )
        if self.validation_users < 0:
            raise ValueError(f"validation_users is {self.validation_users}; it must be 0 (all) or more.")

    @property
    def systems(self) -> list[System]:
        """The systems of `ablations`, in the order in which they are registered."""
        return [system for name, system in ABLATIONS.items() if name in self.ablations]


class Settings(NamedTuple):
    """All settings of a run."""

    data: DataArguments
    retriever: RetrieverArguments
    preferences: PreferenceArguments
    index: IndexArguments
    tasks: TaskArguments
    pipeline: PipelineArguments
    model: ModelConfig
    training: ULMRecTrainingArguments

    @property
    def folder(self) -> Path:
        """The run's output folder."""
        return Path(self.training.output_dir)

    def check(self) -> None:
        """Raises ValueError where settings of different stages do not fit together, before anything is run."""
        if self.retriever.num_candidates < self.tasks.num_candidates:
            raise ValueError(
                f"num_candidates is {self.tasks.num_candidates}, but the retriever brings "
                f"{self.retriever.num_candidates}: raise it in retriever_config."
            )
        self._check_rows()
        for system in self.pipeline.systems:
            if system.model == "own":
                system.mixture(self.tasks.mixture, TASKS)
        if not self.model.model_name_or_path:
            raise ValueError(
                "model_name_or_path is not set: name a causal language model (hub id or folder), or 'embedded' for the "
                "small one that comes with the package."
            )

    def _check_rows(self) -> None:
        """Raises ValueError where an earlier stage does not make what the rows of the tasks show, or makes a leak."""
        wanted, stages = self.tasks.train_positions, {"preference_config": self.preferences}
        if self.tasks.hard_negatives:
            stages["retriever_config"] = self.retriever
        if not KINDS[self.index.index_kind].by_number:
            stages["index_config"] = self.index
        for name, stage in stages.items():
            made = stage.train_positions
            if made and not 0 < wanted <= made:
                raise ValueError(
                    f"train_positions is {wanted}{'' if wanted else ' (all)'}, but that of {name} is {made}: raise it "
                    "there, 0 = all."
                )
        if self.preferences.evidence != self.index.evidence:
            raise ValueError(
                f"evidence is {self.preferences.evidence} in preference_config and {self.index.evidence} in "
                "index_config: set both to train, or both to all, which the paper's protocol needs."
            )
