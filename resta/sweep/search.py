"""Which candidates are measured, and on how many questions: bisection over scales, successive halving over questions.

Harm falls with the scale, refusals and utility lost rise with it. So of each method the smallest scale is looked for at
which the rules on harm would hold on fresh questions: the middle of what is left is asked an eighth of the questions,
then a quarter, a half, all, until it is clear on which side it lies. What is chosen has been asked all of them. A
choice at the end of the grid makes the grid wider. With `--grid` every candidate is asked everything.

The path depends on the answers alone, so that a search that was killed takes it again without asking twice. Knows
nothing of models and files: it sees counts (`Look`) and orders measurements (`Field`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from resta.statistics import Floats
from resta.sweep.candidates import TOWARDS, Candidate
from resta.sweep.forecast import FACTORS, NEED, Outlook, plan_factor
from resta.sweep.response import Seen, fit

EVERY = (8, 4, 2, 1)  # a rung asks one question in so many
LAST = len(EVERY) - 1
DOUBT = 0.05  # a candidate with less of a chance is not asked more
WIDER = 2  # how many scales are added at either end of a grid

Job = tuple[Candidate, int]  # a candidate, and the rung up to which it is asked
Jobs = Generator[Job, None, None]
Finding = Generator[Job, None, Candidate | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a candidate showed on a rung's questions. `broken` names what it breaks whatever else it answers."""

    harm: Seen | None
    refusal: Seen | None
    broken: str | None = None
    norm: float = 0.0

    @property
    def too_much(self) -> bool:
        """Whether what it breaks is no rule on harm, so that a larger scale would not mend it."""
        return self.broken is not None and not self.broken.startswith(("asr.", "regained."))


class Field(Protocol):
    """Where candidates are measured: models and records, or a simulation."""

    def measure(self, jobs: Sequence[Job]) -> None:
        """Ask what is missing; all jobs of one call may run at once."""

    def look(self, candidate: Candidate, rung: int) -> Look:
        """Return what a candidate showed on the questions of a rung."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One measurement of a search, and what it led to."""

    candidate: Candidate
    every: int  # one question in so many was asked
    chance: float
    words: str


@dataclass(kw_only=True)
class Search:
    """A search under way: what has been seen so far, and why.

    Attributes:
        records: where candidates are measured.
        outlook: by which chances are told; its factor grows where no candidate would pass on fewer questions.
        rungs: how far each candidate was asked.
        steps: every measurement, in order.
        reach: the largest scale on the grid, so that all curves of a search are over one range.
    """

    records: Field
    outlook: Outlook
    rungs: dict[Candidate, int] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    reach: float = 0.0

    def look(self, candidate: Candidate) -> Look:
        """Return what a candidate showed on all that it was asked."""
        return self.records.look(candidate, self.rungs[candidate])

    def chance(self, candidate: Candidate, *, safety_alone: bool = False) -> float:
        """Return a candidate's chance to pass on fresh questions, whether it was measured or not."""
        if candidate in self.rungs and self.look(candidate).broken:
            return 0.0
        outlook = self.outlook.safety_alone() if safety_alone else self.outlook
        return outlook.chance(self._rates(candidate, "harm"), self._rates(candidate, "refusal"))

    def refuses_too_much(self, candidate: Candidate) -> bool:
        """Whether a candidate hardly keeps the rules on refusals, so that larger scales will not either."""
        return self.outlook.chance(None, self._rates(candidate, "refusal")) <= DOUBT

    def _rates(self, candidate: Candidate, kind: str) -> Floats | None:
        """Return what is known of a candidate's rate, from all that was seen of its method at scales of its sign."""
        anchor: Mapping[str, Seen] = getattr(self.outlook, kind)
        if not anchor:
            return None
        seen = [] if candidate.groups else [replace(anchor["tuned"], scale=0.0)]
        place = place_of(candidate)
        for other in self.rungs:
            at = place if other == candidate else _place_beside(other, candidate)
            found = getattr(self.look(other), kind) if at is not None else None
            if found is not None and at is not None:
                seen.append(replace(found, scale=at))
        reach = max(abs(scale) for scale in (self.reach, place, *(each.scale for each in seen))) or 1.0
        return fit(tuple(sorted(seen, key=lambda each: each.scale)), reach).draws(place)

    def passing(self) -> list[Candidate]:
        """Return the candidates that were asked everything and would pass."""
        whole = [each for each, rung in self.rungs.items() if rung == LAST and not each.baseline]
        return [each for each in whole if self.chance(each) >= NEED]


def place_of(candidate: Candidate) -> float:
    """Return the scale that varies between a candidate and its neighbours."""
    return candidate.groups[-1][1] if candidate.groups else candidate.scale


def _place_beside(other: Candidate, candidate: Candidate) -> float | None:
    """Return where another candidate lies on a candidate's axis, or None where it lies on another."""
    if candidate.groups:
        group, _ = candidate.groups[-1]
        if replace(candidate, groups=candidate.groups[:-1]) == other:
            return candidate.scale  # the group is scaled as all the rest
        same = other.groups[:-1] == candidate.groups[:-1] and other.groups[-1:] and other.groups[-1][0] == group
        same = same and replace(other, groups=()) == replace(candidate, groups=())
        return other.groups[-1][1] if same else None
    alike = (other.method, other.density, other.groups) == (candidate.method, candidate.density, ())
    return other.scale if alike and other.scale * candidate.scale > 0 else None


# -- one method's scales -------------------------------------------------------------------------------------


def _ask(search: Search, candidate: Candidate, rung: int) -> Jobs:
    yield candidate, rung
    search.rungs[candidate] = rung


def _side(search: Search, candidate: Candidate) -> Generator[Job, None, bool]:
    """Ask more and more until it is clear whether the scale is large enough; return whether it is."""
    for rung in range(LAST + 1):
        yield from _ask(search, candidate, rung)
        look = search.look(candidate)
        chance = search.chance(candidate, safety_alone=True)
        enough = look.too_much or chance >= NEED
        if enough or look.broken or chance <= DOUBT or rung == LAST:
            words = "large enough; smaller scales next" if enough else "too small; larger scales next"
            search.steps.append(
                Step(candidate=candidate, every=EVERY[rung], chance=chance, words=_because(look, words))
            )
            return enough
    raise AssertionError


def _because(look: Look, words: str) -> str:
    return f"{words} ({look.broken})" if look.broken else words


def _bisect(search: Search, series: Sequence[Candidate]) -> Jobs:
    """Narrow down where the rules on harm begin to hold."""
    low, high = -1, len(series)
    while high - low > 1:
        middle = (low + high) // 2
        if (yield from _side(search, series[middle])):
            high = middle
        else:
            low = middle


def _settle(search: Search, series: Sequence[Candidate]) -> Finding:
    """Ask everything of the smallest scale that would pass by what is known, until that is one that was; return it."""
    while True:
        chances = {each: search.chance(each) for each in series}
        good = [each for each in series if chances[each] >= NEED]
        best = good[0] if good else max(series, key=chances.__getitem__)
        if search.rungs.get(best) == LAST:
            return best if good else None
        if not good and chances[best] <= DOUBT:
            return None
        yield from _ask(search, best, LAST)
        chance = search.chance(best)
        words = _because(search.look(best), "would pass" if chance >= NEED else "would not surely pass")
        search.steps.append(Step(candidate=best, every=1, chance=chance, words=words))


def _find(search: Search, series: Sequence[Candidate]) -> Finding:
    """Look for the smallest scale of a method that would pass, and return it."""
    yield from _bisect(search, series)
    return (yield from _settle(search, series))


def _widen(search: Search, series: list[Candidate], found: Candidate | None) -> Finding:
    """Look beyond the end of the grid where the choice lies there, or nothing on it would pass; return the choice."""
    for _ in range(WIDER):
        beyond = _below(series) if found == series[0] else _above(search, series) if found is None else None
        if beyond is None:
            break
        series.insert(0 if found else len(series), beyond)
        enough = yield from _side(search, beyond)
        if enough or not found:
            found = yield from _settle(search, series)
    return found


def _below(series: Sequence[Candidate]) -> Candidate:
    return replace(series[0], scale=_rounded(series[0].scale / 2))


def _above(search: Search, series: Sequence[Candidate]) -> Candidate | None:
    last = series[-1]
    if search.refuses_too_much(last) or (last in search.rungs and search.look(last).too_much):
        return None
    scale = _rounded(1.5 * last.scale)
    if last.method in TOWARDS:
        scale = min(1.0, scale)  # aligned itself
    return replace(last, scale=scale) if scale != last.scale else None


def _rounded(scale: float) -> float:
    return float(f"{scale:.4g}")


def _lower_groups(search: Search, best: Candidate, groups: Sequence[str], scales: Sequence[float]) -> Finding:
    """Lower the scale of one group after the other as far as the rules allow; return what is left of `best`."""
    for group in groups:
        lower = sorted(scale for scale in scales if 0 <= scale < best.scale)
        series = [replace(best, groups=(*best.groups, (group, scale))) for scale in lower]
        if series:
            yield from _bisect(search, series)
            best = (yield from _settle(search, series)) or best
    return best


# -- the whole sweep -----------------------------------------------------------------------------------------


def series_of(candidates: Iterable[Candidate]) -> list[list[Candidate]]:
    """Return candidates by method, density and sign of the scale, the smallest scale first."""
    found: dict[tuple[object, ...], list[Candidate]] = {}
    for each in sorted(candidates, key=lambda each: abs(each.scale)):
        found.setdefault((each.method, each.density, each.scale > 0), []).append(each)
    return list(found.values())


def explore(
    search: Search, candidates: Sequence[Candidate], *, groups: Sequence[str] = (), factors: Sequence[float] = FACTORS
) -> None:
    """Search every method of the candidates; baselines among them are asked everything.

    `factors` are how many times the sweep's questions may be asked afresh, the first that any candidate would
    pass on being taken.
    """
    search.reach = max((abs(each.scale) for each in candidates), default=0.0)
    methods = series_of(each for each in candidates if not each.baseline)
    search.outlook = replace(search.outlook, factor=factors[0])
    found = _together(search, [_find(search, series) for series in methods])
    for factor in factors[1:]:
        if any(found):
            break
        search.outlook = replace(search.outlook, factor=factor)
        found = _together(search, [_settle(search, series) for series in methods])
    found = _together(search, [_widen(search, series, each) for series, each in zip(methods, found, strict=True)])
    best = min((each for each in found if each), key=lambda each: search.look(each).norm, default=None)
    if best is not None and groups:
        scales = [each.scale for each in candidates if not each.baseline]
        _together(search, [_lower_groups(search, best, groups, [0.0, *dict.fromkeys(scales)])])
    ask_all(search, [each for each in candidates if each.baseline])


def ask_all(search: Search, candidates: Sequence[Candidate]) -> None:
    """Ask everything of these candidates, or until they break a rule whatever else they answer."""
    search.records.measure([(each, LAST) for each in candidates])
    search.reach = max([search.reach, *(abs(each.scale) for each in candidates)])
    search.rungs.update(dict.fromkeys(candidates, LAST))


def enough_for_one(search: Search, factors: Sequence[float] = FACTORS) -> None:
    """Set the outlook's factor to the first at which a candidate that was asked everything would pass."""
    for factor in factors:
        search.outlook = replace(search.outlook, factor=factor)
        if search.passing():
            return


def planned_factors(outlook: Outlook) -> tuple[float, ...]:
    """Return how many times the sweep's questions may be needed: at least so many that aligned itself would pass."""
    first = plan_factor(outlook)
    return FACTORS[-1:] if first is None else FACTORS[FACTORS.index(first) :]


def _together(search: Search, searches: Sequence[Finding]) -> list[Candidate | None]:
    """Carry out searches side by side, one job of each at a time; return what each found."""
    found: list[Candidate | None] = [None] * len(searches)
    going = dict(enumerate(searches))
    while going:
        jobs = {}
        for i, each in list(going.items()):
            try:
                jobs[i] = next(each)
            except StopIteration as end:
                found[i] = end.value
                del going[i]
        search.records.measure(list(jobs.values()))
    return found
