"""A sweep's records as the search sees them: counts of harm and refusals on the questions of a rung."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from resta.sweep.candidates import Candidate
from resta.sweep.forecast import Outlook
from resta.sweep.measure import Measure, Sweep, is_complete, read_change, read_references
from resta.sweep.pruning import part_of, why_hopeless
from resta.sweep.response import Seen
from resta.sweep.search import EVERY, Job, Look
from resta.verify.comparison import HARM, REFUSAL, compare
from resta.verify.gate import decide
from resta.verify.measurement import Measurement, pick_judges, read_measurement
from resta.verify.policy import Policy


class Records:
    """The Field of a sweep: orders measurements, and reads what they showed."""

    def __init__(self, sweep: Sweep, measure: Measure):
        self._sweep, self._measure = sweep, measure
        self._references = read_references(sweep)
        self._judges = pick_judges(self._references, sweep.policy.judge)
        self._known: dict[Job, Look] = {}

    def outlook(self) -> Outlook:
        """Return what a forecast needs of the references."""
        return outlook_of(self._references, self._sweep.policy)

    def measure(self, jobs: Sequence[Job]) -> None:
        """Ask what is missing."""
        self._measure(jobs)
        for candidate, _ in jobs:
            self._known = {job: look for job, look in self._known.items() if job[0] != candidate}

    def look(self, candidate: Candidate, rung: int) -> Look:
        """Return what a candidate showed on the questions of a rung."""
        job = (candidate, rung)
        if job not in self._known:
            self._known[job] = self._look(candidate, rung)
        return self._known[job]

    def _look(self, candidate: Candidate, rung: int) -> Look:
        sweep = self._sweep
        folder = sweep.folder(candidate)
        whole = read_measurement(folder)
        plan = sweep.budget.plan(sweep.target(candidate))
        found = _part(whole, {request.id for request in part_of(plan, EVERY[rung]).requests})
        harm, refusal = seen_by(self._judges, found, candidate.scale)
        broken = why_hopeless(self._references, found, sweep.policy)
        if broken is None and is_complete(found, sweep):
            broken = self._lost_utility(found)
        return Look(harm=harm, refusal=refusal, broken=broken, norm=read_change(folder).norm)

    def _lost_utility(self, found: Measurement) -> str | None:
        policy = self._sweep.policy
        comparison = compare({**self._references, "restored": found}, judge=policy.judge, level=policy.level)
        rules = decide(comparison, policy).rules
        lost = [rule for rule in rules if rule.name.startswith("utility.") and rule.outcome == "fails"]
        return f"{lost[0].name}: {lost[0].why}" if lost else None


def outlook_of(references: Mapping[str, Measurement], policy: Policy) -> Outlook:
    """Return what a forecast needs of `aligned` and `tuned`, both measured in full."""
    judges = pick_judges(references, policy.judge)
    seen = {role: seen_by(judges, found) for role, found in references.items()}
    aligned = references["aligned"]
    asked = Counter(q.bank for q in aligned.questions.values() if not q.safe)
    return Outlook(
        policy=policy,
        harm={role: harm for role, (harm, _) in seen.items() if harm is not None},
        refusal={role: refusal for role, (_, refusal) in seen.items() if refusal is not None},
        parts=tuple(count for count in asked.values() for _ in aligned.config["templates"]),
    )


def seen_by(judges: tuple[str, str | None], found: Measurement, scale: float = 0.0) -> tuple[Seen | None, Seen | None]:
    """Return the shares of harm and of refusals by the judges that count; None where nothing of the kind was judged."""
    judge, of_safe = judges
    return seen_of(found, judge, HARM, safe=False, scale=scale), (
        seen_of(found, of_safe, REFUSAL, safe=True, scale=scale) if of_safe else None
    )


def seen_of(found: Measurement, judge: str, labels: frozenset[str], *, safe: bool, scale: float) -> Seen | None:
    """Return the share of judged answers with such a label; answers to one question count as one question."""
    verdicts = {key: each.label for key, each in found.verdicts.get(judge, {}).items()}
    asked = [key for key in verdicts if found.questions[found.answers[key].qid].safe == safe]
    if not asked:
        return None
    share = sum(verdicts[key] in labels for key in asked) / len(asked)
    return Seen(scale=scale, share=share, questions=len({found.answers[key].qid for key in asked}))


def _part(whole: Measurement, requests: set[str]) -> Measurement:
    """Return a measurement as it was when only these had been asked."""
    return replace(
        whole,
        answers={key: answer for key, answer in whole.answers.items() if key in requests},
        verdicts={
            judge: {key: each for key, each in found.items() if key in requests}
            for judge, found in whole.verdicts.items()
        },
    )
