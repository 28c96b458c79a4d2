"""Commands of docs/upcycling.md, as far as they go without the runs that they start from."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from moe_parallel import options, relations

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs/upcycling.md").read_text()
BLOCKS = re.findall(r"(?m)^(?:    .*\n)+", TEXT)
COMMANDS = [line.strip() for block in BLOCKS for line in re.sub(r"\\\n\s*", "", block).splitlines()]
STARTS = [line for line in COMMANDS if re.match(r"python (train|scripts/upcycle)\.py", line)]


@pytest.mark.parametrize("command", STARTS, ids=lambda command: re.findall(r"init=(\w+)", command)[0])
def test_commands_compose(command: str) -> None:
    """Would catch: an option that is gone, more experts for a token than there are, layers that a preset has not."""
    overrides = [word for word in shlex.split(command)[2:] if word != "--plan"]
    relations.check(options.composed(overrides, ROOT / "configs"), 1)


def test_every_map_has_a_command() -> None:
    """Would catch: commands that are not found; a map that its page does not show."""
    shown = {name for command in STARTS for name in re.findall(r"init=(\w+)", command)}
    assert shown == options.INITS.keys() - {"fresh"}
