"""What a model can do, by lm_eval: named profiles, smoke tasks of our own, and the user's own task folder.

The one file that knows lm_eval, which brings tasks, few-shot prompts and scores. The truth is in documents.py: a score
per document, so that models are compared in pairs. A task's score here is the mean over its documents, in a group over
those of all its subtasks. Knows nothing of Red-Eval's questions, of policies or of reports.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import hashlib
import http.client
import importlib.metadata
import io
import json
import logging
import logging.handlers
import math
import os
import random
import sys
import time
import urllib.error
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from resta.errors import RequestError, UnansweredError
from resta.fingerprint import sha256_file, sha256_text
from resta.out_of_memory import is_out_of_memory
from resta.redeval.models import LocalModel, adds_bos, free_bytes
from resta.redeval.targets import KEY, api_key
from resta.served import request
from resta.strict import did_you_mean
from resta.verify.documents import Document, finished_tasks, start_suite, write_documents
from resta.verify.generated import said_of
from resta.verify.scores import is_loss, value_of

SEED = 1234  # lm_eval's own: it draws the few-shot examples
NOTE_S = 30.0  # between two words on how far a task is
LOGITS_SHARE = 0.25  # of the free memory, for the logits of one batch; the rest is for activations
SMOKE = Path(__file__).parent / "task"
REGRESSION = Path(__file__).parent / "regression"

Backend = Literal["hf", "local-completions"]
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One line of a result. `metric` is lm_eval's, with its filter where it has one: acc, or exact_match,strict-match.
    `num_fewshot` None leaves it to the task's own files; `folder` None means lm_eval's tasks.
    """

    name: str
    metric: str
    num_fewshot: int | None
    chat_template: bool = False
    folder: Path | None = None
    higher_is_better: bool = True
    generates: bool = False
    gen_kwargs: tuple[tuple[str, Any], ...] = ()  # in place of the task's own, where it generates


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """The tasks to measure; `folder` is the user's own task folder, where there is one.

    Of a `part` (i, n) are the documents whose content's digest is i modulo n: parts share no document, however often it
    is there.
    """

    name: str
    tasks: tuple[Task, ...]
    folder: Path | None = None
    part: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A model behind `base_url` (ending in /v1) that serves completions with `echo` and `logprobs`, as vLLM does.

    `tokenizer` is the directory of its tokenizer, `context` the longest sequence it takes in tokens. The
    key comes from RESTA_API_KEY.
    """

    base_url: str
    model: str
    tokenizer: str
    context: int = 4096
    connections: int = 8


def _own(name: str, metric: str, num_fewshot: int, *, generates: bool = False) -> Task:
    return Task(name=name, metric=metric, num_fewshot=num_fewshot, generates=generates)


# Chat templates are off, as where these numbers of shots come from.
PROFILES: Mapping[str, tuple[Task, ...]] = {
    # The Open LLM Leaderboard's first version. Its group in lm_eval takes all of TruthfulQA, hence our own list.
    "leaderboard-v1": (
        _own("arc_challenge", "acc_norm", 25),
        _own("hellaswag", "acc_norm", 10),
        _own("mmlu", "acc", 5),
        _own("truthfulqa_mc2", "acc", 0),
        _own("winogrande", "acc", 5),
        _own("gsm8k", "exact_match,strict-match", 5, generates=True),
    ),
    # What Starling (arXiv 2308.09662) reports beside Red-Eval. BBH as multiple choice: nothing is generated.
    "starling": (
        _own("truthfulqa_mc2", "acc", 0),
        _own("mmlu", "acc", 5),
        _own("leaderboard_bbh", "acc_norm", 3),
        _own("bigbench_hhh_alignment_multiple_choice", "acc", 0),
    ),
    # Ours, made from a seed without a network: whether a change of weights has lost something, not how good a model is.
    "regression": (Task(name="regression", metric="acc", num_fewshot=0, folder=REGRESSION),),
    # For smoke tests and the demo only: too easy and too small to say how good a model is.
    "smoke": (
        Task(name="smoke_knowledge", metric="acc", num_fewshot=0, folder=SMOKE),
        Task(name="smoke_sense", metric="acc", num_fewshot=0, folder=SMOKE),
    ),
}


OWN = tuple({task.name: task for tasks in PROFILES.values() for task in tasks}.values())


# -- which tasks ---------------------------------------------------------------------------------------------


def read_suite(
    profile: str | None,
    folder: Path | None,
    names: Sequence[str],
    *,
    num_fewshot: int | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
) -> Suite:
    """Return the tasks of a profile, of a folder of lm_eval task files, or of both.

    `names` chooses among them, and from all that lm_eval has. `num_fewshot` and `gen_kwargs` stand in place
    of the tasks' own.

    A name is TASK, or TASK:METRIC for a task of no profile, whose default is the task's first metric. The folder's
    tasks are read whole, without a network; relative paths in them start at the folder. `chat_template: true` in a
    task's `metadata` asks it through the model's chat template. Raises RequestError.
    """
    _version()
    if profile is None and folder is None and not names:
        raise RequestError(f"nothing to measure: name a profile ({', '.join(PROFILES)}) or a folder of lm_eval tasks")
    if profile is not None and profile not in PROFILES:
        raise RequestError(
            f"unknown utility profile {profile!r}; there are {', '.join(PROFILES)}{did_you_mean(profile, PROFILES)}"
        )
    tasks = PROFILES[profile] if profile is not None else () if folder is not None else OWN
    known = [task.name for task in tasks]
    chosen = [task for task in tasks if not names or task.name in names]
    others = [name for name in names if name not in known]
    if folder is not None:
        found, others, there = _read_folder(folder, others, default=not names)
        chosen, known = [*chosen, *found], [*known, *there]
    where = " + ".join(part for part in (profile, str(folder) if folder is not None else None) if part)
    chosen += [catalogue_task(name, where or "resta", known) for name in others]
    chosen = _changed(chosen, num_fewshot, gen_kwargs)
    counts = Counter(task.name for task in chosen)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise RequestError(f"{twice[0]} is meant twice; name it once, with one metric, or rename the folder's task")
    name = " + ".join(part for part in (profile, folder.name if folder is not None else None) if part) or "tasks"
    return Suite(name=name, tasks=tuple(chosen), folder=folder)


def count_documents(suite: Suite, limit: int | None) -> dict[str, int | None]:
    """Return how many documents each task has, at least, without a network; None where only its source knows.

    Raises RequestError where a task of a folder cannot be read.
    """
    counts: dict[str, int | None] = {}
    with _contained() as log:
        managers = {folder: _manager(folder, log) for folder in {task.folder for task in suite.tasks} - {None}}
        for task in suite.tasks:
            if task.folder is None:
                counts[task.name] = limit
                continue
            leaves = _leaves(managers[task.folder], task.name, task.folder)
            counts[task.name] = sum(map(len, _chosen(leaves, suite.part, limit).values()))
    return counts


def _changed(tasks: Sequence[Task], num_fewshot: int | None, gen_kwargs: Mapping[str, Any] | None) -> list[Task]:
    """Return the tasks with other shots and generation settings. Raises RequestError where they change nothing."""
    if gen_kwargs and not any(task.generates for task in tasks):
        raise RequestError(
            f"no task generates anything ({', '.join(task.name for task in tasks)}): leave gen_kwargs out"
        )
    changed = [task if num_fewshot is None else replace(task, num_fewshot=num_fewshot) for task in tasks]
    given = tuple(sorted((gen_kwargs or {}).items()))
    return [replace(task, gen_kwargs=given) if task.generates else task for task in changed]


def suite_facts(suite: Suite, *, limit: int | None, backend: Backend) -> dict[str, Any]:
    """Return all that must be equal between two models for their documents to be compared, ready for JSON.

    The versions of lm_eval's own tasks go with `lm_eval`; those of a folder's are in the digest of its files.
    """
    digests = {folder: _folder_sha256(folder) for folder in {task.folder for task in suite.tasks} if folder is not None}
    return {
        "name": suite.name,
        "lm_eval": _version(),
        "backend": backend,
        "limit": limit,
        **({} if suite.part is None else {"part": list(suite.part)}),
        "seed": SEED,
        "tasks": {
            task.name: {
                "metric": task.metric,
                "num_fewshot": task.num_fewshot,
                "chat_template": task.chat_template,
                "folder_sha256": digests[task.folder] if task.folder is not None else None,
                **({} if task.higher_is_better else {"higher_is_better": False}),
                **({"gen_kwargs": dict(task.gen_kwargs)} if task.gen_kwargs else {}),
            }
            for task in suite.tasks
        },
    }


def _version() -> str:
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise RequestError("utility needs lm_eval: pip install 'resta[utility]'") from error


def _folder_sha256(folder: Path) -> str:
    """Return the SHA-256 of a folder's files and their names; hidden ones and compiled Python do not count."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        if any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        found.update(f"{name.as_posix()}\0{sha256_file(path)}\n".encode())
    return found.hexdigest()


def _read_folder(folder: Path, names: Sequence[str], *, default: bool) -> tuple[list[Task], list[str], list[str]]:
    """Return the tasks of a folder that `names` means, the names that it lacks, and those that it has.

    For `default` all: its groups, and what is in none.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; expected one of lm_eval task files (*.yaml)")
    folder = folder.resolve()
    with _contained() as log:
        manager = _manager(folder, log)
        if default:
            groups = {name: _leaves(manager, name, folder) for name in manager.all_groups}
            inside = {leaf for leaves in groups.values() for leaf in leaves}
            names = [*groups, *(name for name in manager.all_subtasks if name not in inside)]
        if not manager.all_tasks:
            raise RequestError(f"{folder} holds no lm_eval task (*.yaml with a `task:`)")
        there = [name for name in names if {name, name.rsplit(":", 1)[0]} & set(manager.all_tasks)]
        found = [_folder_task(manager, name, folder) for name in there]
        return found, [name for name in names if name not in there], list(manager.all_tasks)


def _folder_task(manager: Any, asked: str, folder: Path) -> Task:
    name, metric = asked, None
    if name not in manager.all_tasks and ":" in asked:
        name, metric = asked.rsplit(":", 1)
    leaves = _leaves(manager, name, folder)
    shots = {leaf.get_config("num_fewshot") or 0 for leaf in leaves.values()}
    chat = {bool((leaf.get_config("metadata") or {}).get("chat_template")) for leaf in leaves.values()}
    if len(chat) > 1:
        raise RequestError(f"{folder}: only some subtasks of {name} set metadata.chat_template; set it in all or none")
    picked, higher = _pick_metric(leaves, metric, f"{folder}: {name}")
    return Task(
        name=name,
        metric=picked,
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        chat_template=chat.pop(),
        folder=folder,
        higher_is_better=higher,
        generates=any(leaf.OUTPUT_TYPE == "generate_until" for leaf in leaves.values()),
    )


@functools.cache
def _catalogue() -> Mapping[str, Any]:
    """Return lm_eval's index of its own tasks, {name: entry}; reading thousands of files takes about ten seconds."""
    with _contained():
        return dict(_manager(None, ()).task_index)


def catalogue_task(asked: str, where: str, known: Sequence[str]) -> Task:
    """Return one of lm_eval's own tasks, groups or tags by its name, TASK or TASK:METRIC, from its files alone: its
    documents are fetched when it is measured. `where` and `known` say what else was searched. Raises RequestError.
    """
    index = _catalogue()
    name, _, named = asked.partition(":") if asked not in index else (asked, "", "")
    if name not in index:
        hint = did_you_mean(name, known) or did_you_mean(name, index)
        raise RequestError(f"{where} has no task {name!r}, nor has lm_eval; there are {', '.join(known)}{hint}")
    with _contained():
        configs = list(_configs(index, name))
        offered = [_offered(config) for config in configs]
        common = {key: all(o[key] for o in offered) for key in offered[0] if all(key in other for other in offered)}
        if not common and named:  # written in Python: what it scores is known once it is loaded
            from lm_eval.api.registry import is_higher_better

            common = {named: bool(is_higher_better(named.partition(",")[0]))}
    if not common:
        raise RequestError(f"{name}: its files name no metric (of all its subtasks); name one: {name}:METRIC")
    metric = next((m for m in common if named in ("", m, m.partition(",")[0])), None)
    if metric is None:
        raise RequestError(f"{name} has no metric {named!r}; it has {', '.join(common)}{did_you_mean(named, common)}")
    shots = {config.get("num_fewshot") or 0 for config in configs}
    return Task(
        name=name,
        metric=metric,
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        higher_is_better=common[metric],
        generates=any(config.get("output_type") == "generate_until" for config in configs),
    )


def _configs(index: Mapping[str, Any], name: str | Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the files of a task, or of all tasks of a group or tag, as lm_eval's index holds them."""
    own = dict(name) if isinstance(name, Mapping) else {}
    name = str(own.pop("task", "")) if isinstance(name, Mapping) else name
    entry = index.get(name)
    if entry is None:
        yield own
    elif entry.kind.name == "TAG":
        for child in sorted(entry.tags):
            yield from _configs(index, child)
    elif entry.kind.name == "GROUP":
        for child in entry.cfg["task"]:
            yield from _configs(index, child)
    else:
        yield {**entry.cfg, **own}


def _offered(config: Mapping[str, Any]) -> dict[str, bool]:
    """Return a task file's metrics, {name as in Task.metric: whether higher is better}, the default first."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, is_higher_better

    metrics = config.get("metric_list")
    if metrics is None:
        metrics = [{"metric": name} for name in DEFAULT_METRIC_REGISTRY.get(config.get("output_type"), ())]
    filters = [entry["name"] for entry in config.get("filter_list") or [{"name": "none"}]]
    named = {str(m["metric"]): m.get("higher_is_better", None) for m in metrics}
    better = {m: bool(is_higher_better(m) if higher is None else higher) for m, higher in named.items()}
    return {m if part == "none" else f"{m},{part}": higher for part in filters for m, higher in better.items()}


def _metrics(leaf: Any) -> dict[str, str]:
    """Return a task's metrics, {name as in Task.metric: lm_eval's name}, the default first."""
    filters = [entry["name"] for entry in leaf.get_config("filter_list") or [{"name": "none"}]]
    return {
        metric if part == "none" else f"{metric},{part}": metric for part in filters for metric in leaf.aggregation()
    }


def _pick_metric(leaves: Mapping[str, Any], named: str | None, where: str) -> tuple[str, bool]:
    """Return the metric to record, as in Task.metric, and whether higher is better; it must score each document, or be
    made of each document's loss. Raises RequestError.
    """
    from lm_eval.api.metrics import mean

    offered = [_metrics(leaf) for leaf in leaves.values()]
    common = [metric for metric in offered[0] if all(metric in other for other in offered)]
    if not common:
        raise RequestError(f"{where}: its subtasks have no metric in common")
    picked = next((m for m in common if named in (None, m, offered[0][m])), None)
    if picked is None:
        hint = did_you_mean(str(named), common)
        raise RequestError(f"{where} has no metric {named!r}; it has {', '.join(common)}{hint}")
    metric = offered[0][picked]
    higher = {leaf.higher_is_better().get(metric) for leaf in leaves.values()}
    if not is_loss(metric) and any(leaf.aggregation()[metric] is not mean for leaf in leaves.values()):
        why = "it is neither the mean of a score per document nor a perplexity"
    elif len(higher) > 1 or None in higher:
        why = "its files do not say whether higher is better"
    else:
        return picked, bool(higher.pop())
    raise RequestError(
        f"{where}: {picked} cannot be compared in pairs, for {why}; choose a metric such as acc or exact_match "
        f"(TASK:METRIC; there are {', '.join(common)})"
    )


# -- lm_eval, contained --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _contained() -> Iterator[list[logging.LogRecord]]:
    """Run lm_eval as a guest: what it prints is dropped, what it logs is yielded, what it changes is put back.

    Output, environment, seeds and logging belong to the process, so nothing else in it should run meanwhile.
    """
    environment, states = dict(os.environ), (random.getstate(), np.random.get_state())
    buffer = logging.handlers.BufferingHandler(sys.maxsize)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            torch = _import()
            with torch.random.fork_rng(), _logging_to(buffer):
                yield buffer.buffer
        finally:
            os.environ.clear()
            os.environ.update(environment)
            random.setstate(states[0])
            np.random.set_state(states[1])


def _import() -> Any:
    """Import lm_eval and what it logs through, and return torch. Raises RequestError."""
    try:
        import datasets  # noqa: F401
        import evaluate  # noqa: F401
        import lm_eval.evaluator  # noqa: F401
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise RequestError(f"utility needs lm_eval: pip install 'resta[utility]' ({error})") from error
    return torch


@contextlib.contextmanager
def _logging_to(buffer: logging.Handler) -> Iterator[None]:
    names = ("lm_eval", "datasets", "evaluate", "huggingface_hub", "transformers", "asyncio")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level, logger.propagate, logger.handlers) for logger in loggers]
    try:
        for logger in loggers:
            logger.propagate, logger.handlers = False, [buffer]
        loggers[0].setLevel(logging.DEBUG)  # it tells of a task file that it cannot read at this level alone
        yield
    finally:
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate, logger.handlers = propagate, handlers


def _seed() -> None:
    """Seed what a task may draw from as it is read or asked, so that a resumed run draws the same."""
    import torch

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Read a folder's tasks: relative paths start there, and the Hub is not asked for anything."""
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


def _manager(folder: Path | None, log: Sequence[logging.LogRecord]) -> Any:
    """Return lm_eval's index of a folder's tasks, or of its own (in about ten seconds). Raises RequestError."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        return TaskManager()
    start = len(log)
    manager = TaskManager(include_path=folder, include_defaults=False)
    for record in log[start:]:
        # lm_eval goes on without a file that it cannot read, and without the second task of a name. One that holds
        # neither task nor group is there for others to include.
        text = record.getMessage()
        if record.levelno >= logging.WARNING or (text.startswith("Skip ") and "Unknown config shape" not in text):
            raise RequestError(f"{folder}: lm_eval cannot read all of it: {text}")
    return manager


def _leaves(manager: Any, name: str, folder: Path | None) -> dict[str, Any]:
    """Return a task, or all tasks of a group, with their documents: {name: lm_eval's task}. Raises RequestError."""
    where = f"{folder}: {name}" if folder is not None else name
    _seed()
    try:
        with _inside(folder) if folder is not None else contextlib.nullcontext():
            leaves = dict(manager.load([name])["tasks"])
    except Exception as error:  # whatever a task's files, its Python code, or its data's reader may raise
        hint = (
            "relative paths start at the folder, and nothing is fetched"
            if folder is not None
            else "its documents come from the Hugging Face Hub; without a network they must be in its cache"
        )
        raise RequestError(f"{where} cannot be read: {type(error).__name__}: {error} ({hint})") from error
    for leaf in leaves.values():
        if getattr(leaf, "UNSAFE_CODE", False) or getattr(leaf, "MULTIMODAL", False):
            raise RequestError(
                f"{where}: a task that runs generated code, or shows pictures or sound, is not supported"
            )
    return leaves


# -- measuring -----------------------------------------------------------------------------------------------


def backend_of(subject: LocalModel | Served) -> Backend:
    """Return what asks the model. Two of them round differently, so their results are never compared."""
    return "local-completions" if isinstance(subject, Served) else "hf"


def measure(subject: LocalModel | Served, suite: Suite, folder: Path, *, limit: int | None, note: Note) -> None:
    """Measure what is missing of a suite and append it to `folder`, task by task.

    A folder is for one model. `limit` takes the first documents of each task, and of each subtask of a group. `note` is
    told in words how far it is. Raises RequestError, ResumeError, UnansweredError.
    """
    start_suite(folder, suite_facts(suite, limit=limit, backend=backend_of(subject)))
    done = finished_tasks(folder)
    missing = [task for task in suite.tasks if task.name not in done]
    if not missing:
        return
    note = _outside(note)
    with _contained() as log:
        loaded = _load(missing, log, note)  # all before the first question, so that what cannot be read fails now
        lm = _connect(subject, missing, loaded)
        for task in missing:
            start, heard = time.monotonic(), len(log)
            leaves = loaded.pop(task.name)
            which = {"limit": limit} if suite.part is None else {"samples": _chosen(leaves, suite.part, limit)}
            documents = _carefully(subject, functools.partial(_ask, lm, task, leaves, which, note))
            cut = sum("runcat" in record.getMessage() for record in log[heard:])
            seconds = round(time.monotonic() - start, 1)
            write_documents(folder, task.name, documents, cut=cut, seconds=seconds)
            mean = sum(document.value for document in documents) / len(documents)
            note(f"{task.name}: {task.metric} {mean:.3f} over {len(documents)} documents in {seconds} s")
            if cut:
                note(f"{task.name}: {cut} prompts were longer than the model's context and were cut at the start")


def _outside(note: Note) -> Note:
    """Return `note` with the output that was there before lm_eval's was dropped."""
    stdout, stderr = sys.stdout, sys.stderr

    def loud(text: str) -> None:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            note(text)

    return loud


def _load(tasks: Sequence[Task], log: Sequence[logging.LogRecord], note: Note) -> dict[str, dict[str, Any]]:
    managers: dict[Path | None, Any] = {}
    loaded = {}
    for task in tasks:
        if task.folder not in managers:
            managers[task.folder] = _manager(task.folder, log)
        if task.folder is None:
            note(f"{task.name}: reading its documents")
        loaded[task.name] = _leaves(managers[task.folder], task.name, task.folder)
        _pick_metric(loaded[task.name], task.metric, task.name)
    return loaded


def _chosen(leaves: Mapping[str, Any], part: tuple[int, int] | None, limit: int | None) -> dict[str, list[int]]:
    """Return which documents of each subtask are asked: the first `limit` of a part. Raises RequestError for none."""
    chosen = {}
    for name, leaf in leaves.items():
        documents = list(leaf.eval_docs)
        mine = [i for i, each in enumerate(documents) if part is None or _digest(each) % part[1] == part[0]]
        if not mine:
            raise RequestError(
                f"{name}: none of its {len(documents)} documents is in the part that is asked; give more"
            )
        chosen[name] = mine[:limit]
    return chosen


def _digest(document: Any) -> int:
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, default=str)
    return int(sha256_text(text)[:8], 16)


def _ask(lm: Any, task: Task, leaves: Mapping[str, Any], which: Mapping[str, Any], note: Note) -> list[Document]:
    import lm_eval

    for leaf in leaves.values():
        shots = task.num_fewshot if task.num_fewshot is not None else leaf.get_config("num_fewshot")
        leaf.set_config("num_fewshot", shots or 0)
        leaf.set_fewshot_seed(SEED)
        if task.gen_kwargs and leaf.OUTPUT_TYPE == "generate_until":
            leaf.set_config("generation_kwargs", dict(task.gen_kwargs), update=True)
    lm.set_cache_hook(_Progress(task.name, leaves, note))
    lm.begin(task)
    _seed()
    found = lm_eval.evaluate(
        lm=lm,
        task_dict={"tasks": dict(leaves), "groups": {}},
        **which,
        bootstrap_iters=0,
        apply_chat_template=task.chat_template,
        fewshot_as_multiturn=task.chat_template,
    )
    return [
        document
        for leaf, rows in found["samples"].items()
        for document in _documents(task, leaf, rows, leaves[leaf].doc_to_text)
    ]


def _documents(
    task: Task, leaf: str, rows: Iterable[Mapping[str, Any]], question_of: Callable[[Any], object]
) -> Iterator[Document]:
    metric, _, part = task.metric.partition(",")
    seen: Counter[str] = Counter()
    for row in rows:
        if row["filter"] != (part or "none"):
            continue
        value = value_of(task.metric, row.get(metric), higher_is_better=task.higher_is_better, where=leaf)
        identity = row["doc_hash"]
        seen[identity] += 1  # some banks hold a document twice
        repeat = f"#{seen[identity]}" if seen[identity] > 1 else ""
        prefix = f"{leaf}/" if leaf != task.name else ""
        generated, runs = said_of(row, str(question_of(row["doc"])))
        yield Document(
            task=task.name,
            doc_id=f"{prefix}{identity}{repeat}",
            metric=task.metric,
            value=value,
            generated=generated,
            runs=runs,
        )


class _Progress:
    """Stands where lm_eval keeps its cache: told of every request that is answered, it counts them."""

    def __init__(self, name: str, leaves: Mapping[str, Any], note: Note):
        self._name, self._leaves, self._note = name, leaves, note
        self._answered, self._noted = 0, time.monotonic()

    def add_partial(self, attr: str, req: object, res: object) -> None:
        """Count one answered request."""
        self._answered += 1
        if time.monotonic() - self._noted >= NOTE_S:
            self._noted = time.monotonic()
            total = sum(len(leaf.instances) for leaf in self._leaves.values())
            self._note(f"{self._name}: {self._answered} of {total} requests")


def _carefully(subject: LocalModel | Served, ask: Callable[[], list[Document]]) -> list[Document]:
    """Return what `ask` does; what asking a model may raise is raised as an error of ours."""
    import aiohttp
    import requests

    try:
        return ask()
    except (aiohttp.ClientError, requests.RequestException, TimeoutError) as error:
        where = subject.base_url if isinstance(subject, Served) else "the network"
        failed = f"{where}: {type(error).__name__}: {error}; finished tasks are kept"
    except RuntimeError as error:
        if not isinstance(subject, LocalModel) or not is_out_of_memory(error):
            raise
        raise UnansweredError(
            f"{subject.name}: out of memory on {subject.device}; lower --batch-size or use a larger device "
            "(finished tasks are kept)"
        ) from error
    # The other requests in flight have failed too, and say so when they are collected: here, where nobody hears it.
    gc.collect()
    raise UnansweredError(failed)


# -- the two kinds of model ----------------------------------------------------------------------------------


def _connect(subject: LocalModel | Served, tasks: Sequence[Task], loaded: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return lm_eval's model for ours. Raises RequestError where it cannot be asked what the tasks ask."""
    lm = _served_lm(subject) if isinstance(subject, Served) else _local_lm(subject)
    templated = [task.name for task in tasks if task.chat_template]
    if templated and not lm.tokenizer.chat_template:
        raise RequestError(f"the tokenizer has no chat template, which {templated[0]} asks for")
    scored = {leaf.OUTPUT_TYPE for leaves in loaded.values() for leaf in leaves.values()} - {"generate_until"}
    if isinstance(subject, Served) and scored:
        _check_echo(subject, lm.tokenizer("One two three", add_special_tokens=False)["input_ids"])
    return lm


def _local_lm(local: LocalModel) -> Any:
    """Return the loaded model as lm_eval asks it: the weights are shared, the tokenizer is a copy that it may change.

    Log-probabilities are taken in float32. lm_eval takes batches of one size, or finds one by running out of memory;
    here it follows from the longest prompt and the memory that is free.
    """
    from lm_eval.models.huggingface import HFLM

    class Local(HFLM):  # type: ignore[misc, unused-ignore]
        def begin(self, task: Task) -> None:
            pass

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
            longest = max((len(context) + len(end) for _, context, end in requests), default=1)
            self.batch_size_per_gpu = _rows(local, min(longest, self.max_length))
            return super()._loglikelihood_tokens(requests, **options)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            longest = max(len(self.tok_encode(request.args[0])) for request in requests)
            new = max(request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests)
            self.batch_size_per_gpu = local.rows_that_fit(min(longest, self.max_length), new)
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    return Local(
        pretrained=local.model,
        tokenizer=copy.deepcopy(local.tokenizer),
        backend="causal",
        softmax_dtype="float32",
        batch_size=1,
    )


def _rows(local: LocalModel, longest: int) -> int:
    """Return how many sequences of `longest` tokens to score at once, by the size of their logits."""
    free = free_bytes(local.device)
    if free is None:
        return local.batch_rows
    vocabulary = local.model.config.get_text_config().vocab_size
    row_bytes: int = longest * vocabulary * (local.model.dtype.itemsize + 4)  # as they come, and in float32
    return max(1, min(local.batch_rows, math.floor(LOGITS_SHARE * free / row_bytes)))


def _served_lm(served: Served) -> Any:
    """Return the served model as lm_eval asks it: prompts as token ids, so that both sides mean the same tokens."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    class Remote(LocalCompletionsAPI):  # type: ignore[misc, unused-ignore]
        def begin(self, task: Task) -> None:
            self.add_bos_token = adds_bos(self.tokenizer) and not task.chat_template  # a template writes its own

    key = api_key(KEY)
    try:
        return Remote(
            base_url=f"{served.base_url.rstrip('/')}/completions",
            model=served.model,
            tokenizer=served.tokenizer,
            tokenizer_backend="huggingface",
            max_length=served.context,
            num_concurrent=served.connections,
            # Never empty: without a header of ours, lm_eval sends the key that OPENAI_API_KEY holds.
            header={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
        )
    except (OSError, ValueError) as error:
        raise RequestError(f"{served.tokenizer}: no tokenizer can be read there: {error}") from error


def _check_echo(served: Served, ids: Sequence[int]) -> None:
    """Raise RequestError where the server does not give the log-probabilities of a prompt's tokens.

    lm_eval would take what is not there as zero, and the first choice as the answer to everything.
    """
    body = {"model": served.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    url = f"{served.base_url.rstrip('/')}/completions"
    try:
        choice = json.loads(request(url, key=api_key(KEY), body=body, timeout_s=300))["choices"][0]
        found = len((choice.get("logprobs") or {}).get("token_logprobs") or [])
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(300).decode(errors="replace")
        raise RequestError(
            f"{served.base_url}: HTTP {error.code} to a completion with echo and logprobs: {said}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise UnansweredError(f"nothing answers at {served.base_url}: {error}") from error
    except (ValueError, LookupError, AttributeError) as error:
        raise UnansweredError(f"{served.base_url}: not the answer of a completions server: {error!r}") from error
    if found != len(ids) + 1:
        raise RequestError(
            f"{served.base_url} gave {found} log-probabilities for a prompt of {len(ids)} tokens and one new; utility "
            "needs completions with echo and logprobs, which vLLM has and chat endpoints do not"
        )
