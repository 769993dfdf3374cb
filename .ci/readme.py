"""Prints the commands of README.md's ```console blocks as one bash script.

Lines that start with "$ " are commands, lines that start with "> " continue the command above, other lines are output.
Blocks whose info string also says `results` take hours or other hardware: `--results` prints those and no others.
"""

import argparse
import re
from pathlib import Path

FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<info>[^`]*)$")


def console_blocks(text: str) -> list[tuple[str, list[str]]]:
    """(info string, commands) of each fenced block whose language is `console`, in order.

    Raises:
        ValueError: a console block is not closed or holds no command.
    """
    blocks, lines = [], enumerate(text.splitlines(), start=1)
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
            raise ValueError(f"README line {number}: the fenced block is not closed.")
        info = fence["info"].split()
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
            raise ValueError(f"README line {number}: the console block holds no line that starts with '$ '.")
        blocks.append((fence["info"].strip(), commands))
    return blocks


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", type=Path)
    parser.add_argument("--results", action="store_true", help="the blocks marked `results`, which are parsed only")
    args = parser.parse_args(argv)
    blocks = console_blocks(args.readme.read_text(encoding="utf-8"))
    chosen = [commands for info, commands in blocks if ("results" in info.split()) == args.results]
    if not chosen and not args.results:
        raise SystemExit(f"{args.readme} holds no ```console block to run.")
    print("\n".join(command for commands in chosen for command in commands))


if __name__ == "__main__":
    main()
