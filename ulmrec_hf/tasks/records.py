"""The alignment tasks as records: a further task is one record with its template, registered in `TASKS`."""

from dataclasses import dataclass
from zlib import crc32

from ..registry import Registry

MIXTURE = "mixture"  # the config that mixes the tasks' training rows
MIXTURE_SEED = 6  # of the mixture's order; tasks other than the six have larger seeds

# What a template may name, and whether a row needs a target item for it.
FIELDS = {
    "user": False,  # the user index
    "preference": False,  # the user's preference before the target
    "history": False,  # the newest items before the target; beside `rating`, with ratings, and the target as last line
    "candidates": True,  # one lettered line for each candidate
    "letter": True,  # the target's letter, empty where the candidates do not hold the target
    "rating": True,  # the target's rating
    "title": True,  # the target's title
}
# Why a row is left out, by the field that its task requires.
REASONS = {"rating": "the target's rating is unknown", "preference": "the user's preference is empty"}


@dataclass(frozen=True)
class Task:
    """What distinguishes one alignment task from the others.

        TASKS.register("next_title")(
            Task("next_title", ("user", "title"), evaluated=True, prompt="{user} buys:\\n", completion="{title}")
        )

    Attributes:
        name: of the task, its config and its share in the mixture.
        fields: names out of `FIELDS` that its template may use.
        evaluated: every row has a target item, and there are validation and test rows. Otherwise each user has one
            row, for training, with all of the train part before it.
        requires: a field that must be known, or the row is left out: "rating", "preference" or None.
        prompt, completion: the default template, used where a templates file does not have the task; the six built-in
            tasks have theirs in `default_templates.yaml`.
        seed: separates the task's random draws from the other tasks'; derived from the name by default.

    Raises:
        ValueError: an unknown field, a field that needs a target in a task without, or half a template.
    """

    name: str
    fields: tuple[str, ...]
    evaluated: bool = False
    requires: str | None = None
    prompt: str | None = None
    completion: str | None = None
    seed: int | None = None

    def __post_init__(self):
        known = [field for field, needs_target in FIELDS.items() if self.evaluated or not needs_target]
        if not self.name.isidentifier() or self.name == MIXTURE:
            raise ValueError(f"The task name {self.name!r} cannot be used: use letters, digits and underscores.")
        if not set(self.fields) <= set(known):
            kind = "evaluated" if self.evaluated else "not evaluated"
            raise ValueError(f"Task {self.name} has the fields {self.fields}; as it is {kind}, it may have {known}.")
        if self.requires is not None and (self.requires not in REASONS or self.requires not in known):
            raise ValueError(
                f"Task {self.name} requires {self.requires!r}; it may be rating (if evaluated) or preference."
            )
        if (self.prompt is None) != (self.completion is None):
            raise ValueError(f"Task {self.name} needs both prompt and completion, or neither.")
        if self.seed is None:  # the same on every machine, regardless of other tasks
            object.__setattr__(self, "seed", MIXTURE_SEED + 1 + crc32(self.name.encode()))

    @property
    def ranks(self) -> bool:
        """Whether its rows hold candidates."""
        return bool({"candidates", "letter"} & set(self.fields))


_BUILT_IN = (
    Task("next_item", ("user", "history", "candidates", "letter"), evaluated=True, seed=0),
    Task("index_to_preference", ("user", "preference"), requires="preference", seed=1),
    Task("preference_to_index", ("user", "preference"), requires="preference", seed=2),
    Task("history_to_index", ("user", "history"), seed=3),
    Task("rating", ("user", "preference", "history", "rating"), evaluated=True, requires="rating", seed=4),
    Task("intent_next_item", ("preference", "candidates", "letter"), evaluated=True, seed=5),
)
TASKS = Registry("task", **{task.name: task for task in _BUILT_IN})
