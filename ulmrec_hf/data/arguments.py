"""Settings of the data preparation, for YAML and the command line."""

from dataclasses import dataclass

from ..registry import Registry
from ..stages import check_types, setting

READERS = Registry(
    "data_format",
    **{
        name: f"{__package__}.formats:{name.upper()}"
        for name in ("amazon", "csv", "jsonl", "parquet", "hub", "sequences", "synthetic")
    },
)


@dataclass
class DataArguments:
    """Which interactions to read, and which of them to keep.

    Raises:
        ValueError: a setting has a value that cannot be used; the message names the setting.
    """

    data_format: str = setting(
        "synthetic",
        "What --interactions is: amazon (JSON lines of the 2014, 2018 or 2023 release, also gzip), csv, jsonl, "
        "parquet, hub (a dataset id), sequences (JSON lines, one user each, items in order), or synthetic (the toy "
        "world; needs no files).",
    )
    interactions: str | None = setting(None, "File with the interactions; for hub the id or folder of a dataset.")
    items: str | None = setting(None, "File with the items' titles. Without it an item's id serves as its title.")
    k_core: int = setting(
        5,
        "Keep users and items with at least this many interactions, filtered until both hold; 0 = none. Users with "
        "fewer than 3 are always left out: they cannot be split.",
    )
    synthetic_users: int = setting(1000, "Number of users of the toy world.")
    synthetic_seed: int = setting(0, "Seed of the toy world.")

    def __post_init__(self):
        check_types(self)
        reader = READERS[READERS.check(self.data_format)]
        for name, least in (("k_core", 0), ("synthetic_users", 1), ("synthetic_seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if reader.generate is not None:
            for name in ("interactions", "items"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but data_format is {self.data_format!r}, which reads no "
                        "file: set data_format to what the file is."
                    )
        elif not self.interactions:
            raise ValueError(f"data_format is {self.data_format!r}, but interactions is not set: name what to read.")


@dataclass
class StageArguments:
    """Where a stage is written, and whether it may take the place of another one."""

    output_dir: str = setting("output", "Folder of the run; each stage has its own in it.")
    overwrite: bool = setting(False, "Run again what was made with other settings, instead of refusing.")
