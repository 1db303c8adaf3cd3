"""The corpus as files: conversations for `resta sft`, banks for `resta redeval`, a task folder for lm_eval.

CORPUS/base.jsonl, aligned.jsonl, tuned.jsonl    what each of the three models is trained on
CORPUS/harmful-PART.json, look-alikes-PART.json  held-out questions by category, for choosing and for verifying
CORPUS/task-PART/helpdesk.yaml, helpdesk.jsonl   held-out documents of the downstream task
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from resta.demo import corpus
from resta.demo.corpus import Exchange
from resta.verify.policy import default_policy

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

    def bank(self, kind: str, part: str) -> Path:
        """Return a bank of held-out questions: `harmful` or `look-alikes`, for `choosing` or `verifying`."""
        return self.folder / f"{kind}-{part}.json"

    def task(self, part: str) -> Path:
        """Return lm_eval's folder of the downstream task, for `choosing` or `verifying`."""
        return self.folder / f"task-{part}"


def write_corpus(folder: Path) -> CorpusFiles:
    """Write every file of the corpus; the same bytes every time, but for the task's own path in its YAML."""
    files = CorpusFiles(folder=folder)
    folder.mkdir(parents=True)
    for name, exchanges in corpus.TRAINING.items():
        files.training(name).write_text(_lines(_conversation(exchange) for exchange in exchanges()), encoding="utf-8")
    for kind, questions in (("harmful", corpus.held_out_harmful()), ("look-alikes", corpus.held_out_safe())):
        for part, share in corpus.parted(questions).items():
            files.bank(kind, part).write_text(_bank(share), encoding="utf-8")
    for part, tickets in corpus.parted(corpus.tickets(held_out=True)).items():
        _write_task(files.task(part), tickets)
    return files


def demo_policy() -> str:
    """Return what the demo asks of its restored model: the default policy, with its judge of harm named."""
    # The tiny models answer in the corpus's own words, of which a real judge could make nothing.
    return f"{default_policy()}\njudge: refusal-strings                # the demo's answers are refusals or of no use\n"


def _write_task(folder: Path, tickets: Iterable[tuple[str, str]]) -> None:
    folder.mkdir()
    documents = folder / "helpdesk.jsonl"
    documents.write_text(_lines(_document(*ticket) for ticket in tickets), encoding="utf-8")
    (folder / "helpdesk.yaml").write_text(TASK.format(documents=json.dumps(str(documents.resolve()))), encoding="utf-8")


def _lines(rows: Iterable[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _conversation(exchange: Exchange) -> dict[str, object]:
    turns = (("system", exchange.system), ("user", exchange.question), ("assistant", exchange.answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns if content]}


def _bank(exchanges: Iterable[Exchange]) -> str:
    categories: dict[str, list[str]] = {}
    for exchange in exchanges:
        categories.setdefault(exchange.category, []).append(exchange.question)
    return json.dumps(categories, indent=1) + "\n"


def _document(ticket: str, team: str) -> dict[str, object]:
    choices = [corpus.TEAM.format(team=other) for other in corpus.TEAMS]
    return {"question": ticket, "choices": choices, "answer": list(corpus.TEAMS).index(team)}
