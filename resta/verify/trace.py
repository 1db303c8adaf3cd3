"""The trace that decisions leave: OUT/decisions.jsonl has a line for each, which nothing removes or rewrites.

A verdict means nothing without the policy behind it, and the same measurements may be held against several: so every
report names the policy, its digest and the date, and what was decided otherwise in the same folder before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resta.fingerprint import digest
from resta.journal import Journal, read_lines
from resta.redeval.records import SCHEMA, content_of, utc_now
from resta.verify.comparison import Comparison
from resta.verify.decision import Decision
from resta.verify.policy import Policy, read_policy

DECISIONS = "decisions.jsonl"
SHOWN = 5  # earlier decisions that a report names; the file has them all


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling:
    """When and by what a decision was made: `policy_name` is the policy's own or its file's, `versions` are {package:
    version}, `earlier` the lines of decisions made in the same place before, oldest first.
    """

    policy: Policy
    policy_name: str
    decided_at: str  # ISO 8601, UTC
    versions: Mapping[str, str]
    earlier: tuple[Mapping[str, Any], ...] = ()

    @property
    def policy_sha256(self) -> str:
        """Return the digest of what the policy says, whatever its file's comments and order."""
        return digest(self.policy.model_dump(mode="json"))

    @property
    def words(self) -> str:
        """Return date and policy in one line, as they stand on every report."""
        return f"Decided {self.decided_at} under the policy {self.policy_name} (sha256 {self.policy_sha256[:12]})"


def make_ruling(out: Path, policy: Policy, policy_file: Path | None, versions: Mapping[str, str]) -> Ruling:
    """Return the ruling of a decision that is made now in the folder OUT. Raises ResumeError."""
    return Ruling(
        policy=policy,
        policy_name=policy.name or _name(policy, policy_file),
        decided_at=utc_now(),
        versions=versions,
        earlier=tuple(read_lines(out / DECISIONS)),
    )


def _name(policy: Policy, file: Path | None) -> str:
    if file is not None:
        return file.name
    return "default" if policy == read_policy(None) else "unnamed"


def append_decision(out: Path, comparison: Comparison, decision: Decision, ruling: Ruling) -> None:
    """Add a decision's line to OUT/decisions.jsonl."""
    with Journal(out / DECISIONS) as journal:
        journal.append(line_of(comparison, decision, ruling))


def line_of(comparison: Comparison, decision: Decision, ruling: Ruling) -> dict[str, Any]:
    """Return a decision as its line: date, policy, who was compared, by whose judgement, and what came of each rule."""
    return {
        "decided_at": ruling.decided_at,
        "verdict": decision.verdict.name,
        "limits": decision.tier or "default",
        "exit_code": decision.verdict.value,
        "summary": decision.summary,
        "policy": {"name": ruling.policy_name, "sha256": ruling.policy_sha256},
        "models": {
            role: {"name": model.name, "sha256": digest(content_of(model.target)), "measured_at": model.measured_at}
            for role, model in comparison.models.items()
        },
        "judge": {"name": comparison.judge, "sha256": comparison.judge_facts.get("sha256")},
        "pairs": comparison.pairs,
        "documents": {task.task: task.documents for task in comparison.utility},
        "rules": {rule.name: rule.outcome for rule in decision.rules},
        "resta": ruling.versions.get("resta"),
        "schema": SCHEMA,
    }


def decided_otherwise(decision: Decision, ruling: Ruling) -> list[Mapping[str, Any]]:
    """Return the earlier decisions with another verdict, oldest first."""
    return [line for line in ruling.earlier if line["verdict"] != decision.verdict.name]


def with_earlier(comparison: Comparison, decision: Decision, ruling: Ruling) -> Decision:
    """Return the decision with a note for every earlier one in the same place that said something else."""
    return replace(decision, notes=(*_notes(comparison, decision, ruling), *decision.notes))


def _notes(comparison: Comparison, decision: Decision, ruling: Ruling) -> Iterable[str]:
    own = line_of(comparison, decision, ruling)
    others = decided_otherwise(decision, ruling)
    for line in others[-SHOWN:]:
        policy = line["policy"]
        which = "the same policy" if policy["sha256"] == ruling.policy_sha256 else f"the policy {policy['name']}"
        models = "these models" if _who(line) == _who(own) else "other models"
        yield (
            f"Decided otherwise before: {line['verdict']} for {models} under {which} (sha256 {policy['sha256'][:12]}, "
            f"{line['decided_at']}): {line['summary']}"
        )
    if len(others) > SHOWN:
        yield f"{len(others) - SHOWN} still earlier decisions said something else; see {DECISIONS}."


def _who(line: Mapping[str, Any]) -> dict[str, str]:
    return {role: model["sha256"] for role, model in line["models"].items()}
