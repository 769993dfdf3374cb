"""Open registries: what the package has of a kind, by name, and what others add to it."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any


class Registry(Mapping[str, Any]):
    """Names and what they stand for, in the order in which they were added.

    Others add their own by `register`, or, so that every process and every recipe knows it, by an entry point of the
    group `ulmrec_hf.<kind>` in their package's metadata.

    Args:
        kind: the setting that holds such a name, such as "retriever"; errors say it.
        entries: the package's own: objects, or strings "module:name" that are imported when first asked for.
    """

    def __init__(self, kind: str, **entries: Any):
        self.kind, self._entries, self._searched = kind, dict(entries), False

    def register(self, name: str) -> Callable[[Any], Any]:
        """A decorator that adds what it decorates; `registry.register("name")(value)` adds any value.

        Raises:
            ValueError: the name is taken.
        """

        def add(value: Any) -> Any:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} exists already: choose another name.")
            self._entries[name] = value
            return value

        return add

    def check(self, name: str, setting: str | None = None) -> str:
        """The name, if it is known; otherwise a ValueError that lists the names."""
        if name not in self:
            raise ValueError(f"{setting or self.kind} is {name!r}; it must be one of {', '.join(self)}.")
        return name

    def __getitem__(self, name: str) -> Any:
        value = self._found()[name]
        if isinstance(value, str):
            module, _, attribute = value.partition(":")
            value = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._found()

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def _found(self) -> dict[str, Any]:
        if not self._searched:
            self._searched = True
            for point in entry_points(group=f"ulmrec_hf.{self.kind}"):
                self._entries.setdefault(point.name, point.value)
        return self._entries
