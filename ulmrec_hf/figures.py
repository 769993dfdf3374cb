"""What every report draws and writes with: figures, axes, colours, numbers and Markdown tables."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#3b6ea8", "#d9822b", "#9aa5b1"


def save_figure(
    path: str | os.PathLike, draw: Callable[["Figure"], None], size: tuple[float, float] = (6.4, 4)
) -> None:
    """Writes what `draw` puts on a figure of `size` inches as PNG, atomically; equal figures give equal bytes."""
    # A Figure without pyplot needs no display and leaves the user's backend alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=130, metadata={"Software": None})


def plain_axes(axes: Any, grid: str = "both") -> None:
    """Axes with a light grid ("x", "y" or "both") behind the data and no frame at the top and right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e3e7eb", lw=0.8)
    axes.set_axisbelow(True)


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """A Markdown table; its first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def number(value: float | None, form: str = ".4f") -> str:
    """A number as text, `n/a` for None."""
    return "n/a" if value is None else f"{value:{form}}"
