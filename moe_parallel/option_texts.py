"""What `--help` says of every option, and which one was probably meant: read from the dataclasses themselves."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

KINDS = "kinds"
"""In the metadata of a field: the dataclasses that a choice of its group may bring, by name."""


@dataclass(frozen=True)
class Option:
    """One option as `--help` shows it."""

    name: str
    type: str
    default: str
    text: str
    choices: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...] = ()
    """Which kinds of its section have it; none if all do."""


@cache
def describe(root: type) -> tuple[Option, ...]:
    """All options of a dataclass of sections, in order."""
    found: list[Option] = []
    hints, texts = typing.get_type_hints(root), _field_texts(root)
    for field in dataclasses.fields(root):
        hint = hints[field.name]
        if kinds := field.metadata.get(KINDS):
            found += _options_of_kinds(field.name, kinds)
        elif dataclasses.is_dataclass(hint):
            found += _section_options(field.name, typing.cast(type, hint))
        else:
            found.append(Option(field.name, hint.__name__, _default_text(field), texts.get(field.name, ""), ()))
    return tuple(found)


def _options_of_kinds(section: str, kinds: dict[str, type]) -> list[Option]:
    """Options that all kinds share first, then those of some, each with their names."""
    having: dict[Option, list[str]] = {}
    for name, kind in kinds.items():
        for option in _section_options(section, kind):
            having.setdefault(option, []).append(name)
    shared = [option for option, names in having.items() if len(names) == len(kinds)]
    others = [dataclasses.replace(o, kinds=tuple(names)) for o, names in having.items() if len(names) < len(kinds)]
    return shared + others


def did_you_mean(wrong: str, names: Iterable[str]) -> str:
    """ "; did you mean ...?" with the names that are most like it, or nothing."""
    names = sorted(set(names))
    near = difflib.get_close_matches(wrong, names, n=3, cutoff=0.7)
    if not near:  # the right name in another section, or without one
        leaf = wrong.rsplit(".", 1)[-1]
        leaves = difflib.get_close_matches(leaf, {name.rsplit(".", 1)[-1] for name in names}, n=1, cutoff=0.8)
        near = [name for name in names if name.rsplit(".", 1)[-1] in leaves][:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _section_options(prefix: str, kind: type) -> list[Option]:
    found: list[Option] = []
    hints = typing.get_type_hints(kind)
    texts = _field_texts(kind)
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}.{field.name}", hints[field.name]
        inner = _inner_dataclass(hint)
        if inner is not None and typing.get_origin(hint) is not list:
            found += _section_options(name, inner)
            continue
        found.append(Option(name, _type_text(hint), _default_text(field), texts.get(field.name, ""), _choices(hint)))
        if inner is not None:
            found += _section_options(f"{name}[]", inner)
    return found


def _default_text(field: dataclasses.Field[Any]) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"
    if isinstance(default, list):
        return f"[{', '.join(str(getattr(item, 'name', item)) for item in default)}]"
    if default is None or isinstance(default, bool):
        return "null" if default is None else str(default).lower()
    return str(default.value if isinstance(default, Enum) else default)


def _inner_dataclass(hint: Any) -> type | None:
    kinds = [hint, *typing.get_args(hint)]
    return next((k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)), None)


def _type_text(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "choice"
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return re.sub(r"(\w+\.)+", "", text).replace("NoneType", "null").replace("None", "null")


def _choices(hint: Any) -> tuple[tuple[str, str], ...]:
    kinds = [hint, *typing.get_args(hint)]
    enum = next((k for k in kinds if isinstance(k, type) and issubclass(k, Enum)), None)
    if enum is None:
        return ()
    texts = _field_texts(enum)
    return tuple((str(member.value), texts.get(member.name, "")) for member in enum)


@cache
def _field_texts(kind: type) -> dict[str, str]:
    """The string under each field, base classes first."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        body = _classes(base.__module__).get(base.__name__, [])
        for before, after in pairwise(body):
            target: ast.expr | None = before.target if isinstance(before, ast.AnnAssign) else None
            if isinstance(before, ast.Assign):
                target = before.targets[0]
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            if isinstance(target, ast.Name) and isinstance(text, str):
                texts[target.id] = " ".join(text.split())
    return texts


@cache
def _classes(module: str) -> dict[str, list[ast.stmt]]:
    """Bodies of a module's classes: each file is parsed once, however many classes it has."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):  # not written in Python
        return {}
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def help_text(root: type, config_folders: list[Path]) -> str:
    """What `--help` prints: how to run, the choices of each group, and every option with its text."""
    lines = [
        "Train a mixture-of-experts language model.",
        "",
        "  python train.py [group=choice] [option=value]                 one process",
        "  torchrun --nproc-per-node 2 train.py parallel.ep=2 [...]      several, experts split over them",
        "  python train.py --cfg job [...]                               show the composed configuration",
        "  python train.py --config-dir DIR [...]                        add configs of your own",
        "  python train.py -m router.top_k=2,4 [...]                     sweep",
        "",
        "Exit codes: 0 done, 2 a mistake in options or data, 75 stopped by SIGTERM or SIGUSR1 after a checkpoint (the",
        "file that REQUEUE_MARK names is written, too), others a fault. MOE_PARALLEL_TRACEBACK=1 shows where a mistake",
        "was found.",
        "",
        "Groups and their choices",
    ]
    for group in sorted({g for folder in config_folders for g in _groups(folder)}):
        names = sorted({p.stem for folder in config_folders for p in (folder / group).glob("*.yaml")})
        lines.append(f"  {group}={'|'.join(names)}")
    section = ""
    for option in describe(root):
        head = option.name.split(".")[0] if "." in option.name else ""
        if head != section:
            section = head
            lines += ["", f"{section}" if section else "Top level"]
        kinds = f"; {', '.join(option.kinds)}" if option.kinds else ""
        lines.append(f"  {option.name}={option.default}  ({option.type}{kinds})")
        lines += textwrap.wrap(option.text, 104, initial_indent="      ", subsequent_indent="      ")
        if not any(text for _, text in option.choices):
            lines += textwrap.wrap(", ".join(value for value, _ in option.choices), 104, initial_indent=" " * 8)
            continue
        for value, text in option.choices:
            line = f"{value}: {text}" if text else value
            lines += textwrap.wrap(line, 104, initial_indent=" " * 8, subsequent_indent=" " * 10)
    return "\n".join(lines)


def _groups(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    # What a plan knows of machines is no option of a run.
    return [p.name for p in folder.iterdir() if p.is_dir() and p.name != "cluster" and any(p.glob("*.yaml"))]
