"""Small corpora in every format, and no waiting and no network in `datasets`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# On a busy machine a single example may take longer than the default deadline without anything being wrong.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(autouse=True)
def quick_datasets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing a half-read stream sleeps five seconds by default; caches stay out of the home folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "hf")


def texts_of(count: int, prefix: str = "doc") -> list[str]:
    """Distinct documents of very different lengths: some span sequences, some fit several into one."""
    return [f"{prefix} {i}: " + f"word{i} " * (1 + i * 7 % 23) for i in range(count)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The same 61 documents as jsonl (two files), parquet, arrow and text files."""
    import datasets

    texts = texts_of(61)
    for name, part in (("a", texts[:40]), ("b", texts[40:])):
        lines = "".join(json.dumps({"text": text, "number": i}) + "\n" for i, text in enumerate(part))
        (tmp_path / f"{name}.jsonl").write_text(lines)
        table = datasets.Dataset.from_dict({"text": part})
        table.to_parquet(str(tmp_path / f"{name}.parquet"))
        table.save_to_disk(str(tmp_path / f"saved_{name}"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text)
    return tmp_path
