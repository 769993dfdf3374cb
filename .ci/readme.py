"""Prints the commands in the ```console blocks of Markdown files as one bash script.

Lines that start with "$ " are commands, lines that start with "> " continue the command above, other lines are output.
Blocks whose info string also says `results` take hours or other hardware: `--results` prints those and no others.
`python_script` joins the ```python blocks of a file, for the tests.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<info>[^`]*)$")


def fenced_blocks(text: str, source: str = "text") -> Iterator[tuple[int, list[str], list[str]]]:
    """Yields (line number, words of the info string, lines) of each fenced block, in order.

    Raises:
        ValueError: a block is not closed.
    """
    lines = enumerate(text.splitlines(), start=1)
    for number, line in lines:
        fence = FENCE.match(line)
        if not fence:
            continue
        body = []
        for _, inside in lines:
            if re.fullmatch(f"{fence['ticks']}`*", inside.rstrip()):
                break
            body.append(inside)
        else:
            raise ValueError(f"{source} line {number}: the fenced block is not closed.")
        yield number, fence["info"].split(), body


def console_blocks(text: str, source: str = "text") -> list[tuple[list[str], list[str]]]:
    """(words of the info string, commands) of each fenced block whose language is `console`, in order.

    Raises:
        ValueError: a block is not closed, or a console block holds no command.
    """
    blocks = []
    for number, info, body in fenced_blocks(text, source):
        if info[:1] != ["console"]:
            continue
        commands: list[str] = []
        for inside in body:
            if inside.startswith("$ "):
                commands.append(inside[2:])
            elif inside.startswith("> ") and commands:
                commands[-1] += "\n" + inside[2:]
            elif commands and commands[-1].endswith("\\"):
                commands[-1] += "\n" + inside
        if not commands:
            raise ValueError(f"{source} line {number}: the console block holds no line that starts with '$ '.")
        blocks.append((info, commands))
    return blocks


def python_script(text: str, source: str = "text") -> str:
    """All ```python blocks as one script, empty where there is none; line numbers are those of the Markdown file."""
    script: list[str] = []
    for number, info, body in fenced_blocks(text, source):
        if info[:1] == ["python"]:
            script += [""] * (number - len(script)) + body
    return "\n".join([*script, ""]) if script else ""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="Markdown files")
    parser.add_argument("--results", action="store_true", help="the blocks marked `results`, which are parsed only")
    args = parser.parse_args(argv)
    commands = [
        command
        for path in args.files
        for info, block in console_blocks(path.read_text(encoding="utf-8"), str(path))
        if ("results" in info) == args.results
        for command in block
    ]
    if not commands and not args.results:
        raise SystemExit(f"{', '.join(map(str, args.files))}: no ```console block to run.")
    print("\n".join(commands))


if __name__ == "__main__":
    main()
