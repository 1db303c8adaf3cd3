"""The corpus as files: conversations for `resta sft`, banks for `resta redeval`, a task folder for lm_eval.

CORPUS/base.jsonl, aligned.jsonl, tuned.jsonl    what each of the three models is trained on
CORPUS/harmful.json, look-alikes.json            held-out questions by category
CORPUS/task/helpdesk.yaml, helpdesk.jsonl        held-out documents of the downstream task
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from resta.demo import corpus
from resta.demo.corpus import Exchange

# lm_eval reads a relative path from the current directory, hence the absolute one.
TASK = """\
# The help desk's tickets that were never trained on: which of four teams does the model think most likely?
task: helpdesk
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0, chat_template: true}}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusFiles:
    """Where the files of a corpus lie."""

    folder: Path

    def training(self, name: str) -> Path:
        """Return the conversations that `base`, `aligned` or `tuned` is trained on."""
        return self.folder / f"{name}.jsonl"

    @property
    def harmful(self) -> Path:
        """Return the bank of held-out harmful questions."""
        return self.folder / "harmful.json"

    @property
    def safe(self) -> Path:
        """Return the bank of held-out safe look-alikes."""
        return self.folder / "look-alikes.json"

    @property
    def task(self) -> Path:
        """Return lm_eval's folder of the downstream task."""
        return self.folder / "task"


def write_corpus(folder: Path) -> CorpusFiles:
    """Write every file of the corpus; the same bytes every time, but for the task's own path in its YAML."""
    files = CorpusFiles(folder=folder)
    files.task.mkdir(parents=True)
    for name, exchanges in corpus.TRAINING.items():
        files.training(name).write_text(_lines(_conversation(exchange) for exchange in exchanges()), encoding="utf-8")
    files.harmful.write_text(_bank(corpus.held_out_harmful()), encoding="utf-8")
    files.safe.write_text(_bank(corpus.held_out_safe()), encoding="utf-8")
    documents = files.task / "helpdesk.jsonl"
    documents.write_text(_lines(_document(*ticket) for ticket in corpus.tickets(held_out=True)), encoding="utf-8")
    (files.task / "helpdesk.yaml").write_text(
        TASK.format(documents=json.dumps(str(documents.resolve()))), encoding="utf-8"
    )
    return files


def _lines(rows: Iterable[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _conversation(exchange: Exchange) -> dict[str, object]:
    turns = (("user", exchange.question), ("assistant", exchange.answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _bank(exchanges: Iterable[Exchange]) -> str:
    categories: dict[str, list[str]] = {}
    for exchange in exchanges:
        categories.setdefault(exchange.category, []).append(exchange.question)
    return json.dumps(categories, indent=1) + "\n"


def _document(ticket: str, team: str) -> dict[str, object]:
    choices = [corpus.TEAM.format(team=other) for other in corpus.TEAMS]
    return {"question": ticket, "choices": choices, "answer": list(corpus.TEAMS).index(team)}
