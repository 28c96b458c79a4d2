"""A corpus in domains that needs no download: text that comes with every Python and the packages beside it.

The texts stay where they are and are read at run time; their licences are their own. Content varies with the
versions of Python and packages, so runs on different machines are not comparable to the last digit.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moe_data.order import derive_key, mix

LEAST_BYTES = 50_000
"""A domain with less text is refused: it would be repeated over and over."""

RANDOM_LETTERS, RANDOM_DOCUMENT = "abcdefghijklmnopqrstuvwxyz012345", 4096
"""Of the generated domain `random`: its 32 letters, and the length of a document."""

LONGEST_DOCUMENT = 65_536
"""Characters; longer texts are split at blank lines, so that no single document decides what is held out."""


def standard_library(folder: str, inside: bool) -> list[Path]:
    """Python files of the standard library: those of one folder (inside) or all but tests and data tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    if inside:
        return sorted((root / folder).rglob("*.py"))
    # Sibling installations and generated tables would drown the code that people wrote.
    skip = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "pydoc_data",
        "encodings",
        "__pycache__",
    }
    files = []
    for place, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - skip)
        files += [Path(place) / name for name in names if name.endswith(".py")]
    return sorted(files)


def headers() -> list[Path]:
    """C headers of Python, then C++ headers of torch, which is always there."""
    places = [Path(sysconfig.get_paths()["include"])]
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        places.append(Path(torch.origin).parent / "include")
    return [file for place in places for file in sorted(place.rglob("*.h"))]


def distributions(*patterns: str) -> list[Path]:
    """Files of installed packages' *.dist-info folders."""
    places = sorted({Path(entry) for entry in sys.path if entry.endswith("-packages") and os.path.isdir(entry)})
    infos = [info for place in places for info in sorted(place.glob("*.dist-info"))]
    return [file for info in infos for pattern in patterns for file in sorted(info.glob(pattern)) if file.is_file()]


def read(file: Path) -> str | None:
    """Text of a file; None if it is not UTF-8 or has vanished: a corpus can do without it."""
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None


def parse(text: str) -> list[ast.Constant]:
    """Docstrings of a module, as nodes with their places."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.append(value)
    return sorted(found, key=lambda node: node.lineno)


def code_of(text: str) -> str:
    """A module without its docstrings: they are the domain `prose`."""
    lines = text.splitlines(keepends=True)
    for node in parse(text):
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "".join(lines)


def prose_of(text: str) -> str:
    """The docstrings of a module that are more than a line, one after the other."""
    docs = (inspect.cleandoc(node.value) for node in parse(text) if isinstance(node.value, str))
    return "\n\n".join(doc for doc in docs if len(doc) >= 80)


def body_of(text: str) -> str:
    """Package metadata without its header fields."""
    return text.partition("\n\n")[2]


def topics_of(text: str) -> str:
    """The strings of a generated module of help topics, longest part of the language reference."""
    strings = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return "\f".join(value for value in strings if isinstance(value, str) and len(value) > 200)


def whole(text: str) -> str:
    return text


def random_documents(megabytes: float) -> list[str]:
    """Letters drawn evenly and independently: a causal model cannot get below log(32) = 3.466 nats a letter."""
    size = max(LEAST_BYTES, int(megabytes * 1e6))
    letters = np.frombuffer(RANDOM_LETTERS.encode(), dtype=np.uint8)
    number_N = mix(np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(derive_key("random")))
    text = letters[number_N >> np.uint64(59)].tobytes().decode()  # the upper 5 bits
    return [text[begin : begin + RANDOM_DOCUMENT] for begin in range(0, size, RANDOM_DOCUMENT)]


DOMAINS: dict[str, tuple[str, Callable[[], list[Path]], Callable[[str], str]]] = {
    "code": ("Python code of the standard library", lambda: standard_library("", False), code_of),
    "tests": ("tests of the standard library", lambda: standard_library("test", True), whole),
    "prose": ("docstrings of the standard library", lambda: standard_library("", False), prose_of),
    "reference": ("the Python language reference", lambda: standard_library("pydoc_data", True), topics_of),
    "legal": (
        "licences of installed packages",
        lambda: distributions("licenses/**/*", "LICEN*", "NOTICE*"),
        whole,
    ),
    "markdown": ("read-me texts of installed packages", lambda: distributions("METADATA"), body_of),
    "headers": ("C and C++ headers of Python and torch", headers, whole),
    "tables": ("character encoding tables", lambda: standard_library("encodings", True), whole),
    "random": ("letters drawn at random", list, whole),
}
"""Domain -> what it is, its files, and how a file becomes text. Some Pythons come without `tests`;
`random` is generated."""


def check_domain(domain: str) -> None:
    if domain not in DOMAINS:
        raise ValueError(
            f"data.sources: name={domain} is not a domain of the embedded corpus; choose from {', '.join(DOMAINS)}"
        )


def listing(domain: str) -> list[list[str | int]]:
    """Names and sizes of a domain's files: what its text depends on."""
    return [[str(file), file.stat().st_size] for file in DOMAINS[domain][1]()]


def collect(domain: str, max_megabytes: float | None = None) -> list[str]:
    """Documents of one domain, in a stable order, without repetitions.

    Args:
        domain: one of DOMAINS.
        max_megabytes: stop after this much text; the files are then a sample over the whole domain.
    Raises:
        ValueError: this machine has next to nothing of the domain.
    """
    if domain == "random":
        return random_documents(2.0 if max_megabytes is None else max_megabytes)
    described, find, extract = DOMAINS[domain]
    limit = float("inf") if max_megabytes is None else max_megabytes * 1e6
    documents: list[str] = []
    seen: set[str] = set()
    size = 0
    # By hash of the name, not by name: a limit must not cut off the end of the alphabet. The name is taken
    # from its last parts, which do not depend on where Python is installed.
    for file in sorted(find(), key=lambda file: (stable_hash("/".join(file.parts[-3:])), str(file))):
        text = read(file)
        for document in split(extract(text) if text else ""):
            key = stable_hash(essence(document))
            if key not in seen and size < limit:
                seen.add(key)
                documents.append(document)
                size += len(document.encode(errors="surrogatepass"))
        if size >= limit:
            break
    if size < LEAST_BYTES:
        raise ValueError(
            f"source '{domain}': this machine has {size:,} bytes of {described}, at least {LEAST_BYTES:,} "
            f"are needed (data.sources[{domain}].max_megabytes={max_megabytes}); remove the source, or "
            f"choose from {', '.join(name for name in DOMAINS if name != domain)}"
        )
    return documents


def split(text: str) -> Iterator[str]:
    """Parts of at most LONGEST_DOCUMENT characters where blank lines allow; form feeds always part."""
    for page in text.split("\f"):
        part: list[str] = []
        length = 0
        for paragraph in re.split(r"(?<=\n)(?=\n)", page):
            if length and length + len(paragraph) > LONGEST_DOCUMENT:
                yield "".join(part).strip("\n") + "\n"
                part, length = [], 0
            part.append(paragraph)
            length += len(paragraph)
        if "".join(part).strip():
            yield "".join(part).strip("\n") + "\n"


def essence(document: str) -> str:
    """What two copies of a text share though names and spacing differ: licences repeat with another owner."""
    lines = (line for line in document.lower().splitlines() if "copyright" not in line)
    return " ".join(" ".join(lines).split())


def stable_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=12).hexdigest()
