"""The documents of the regression check: starts of sentences with four ends each, drawn from a seed.

Sums, sequences, things to look up in the lines before, orders, letters, and words and capitals that everybody
knows: a little of each of what a change of weights may damage. A model of 135M parameters knows about half of it,
one of several billion nearly all: it says whether a model has lost something, not how good it is. Equal on every
machine: Python guarantees the `Random.random()` of a seed, and nothing else is drawn from. No start stands twice,
so that documents are independent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

SEED = 20261124
CHOICES = 4

Item = TypeVar("Item")
Draft = tuple[str, str, Sequence[str]]  # start, right end, at least three wrong ones


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina")
COLOURS = _words("red blue green yellow black white brown purple grey pink")
THINGS = _words("ball hat bag car cup coat book kite boat lamp bicycle door shirt chair")
SMALL_THINGS = _words("key ring pen coin letter phone watch spoon ticket map")
PLACES = _words("kitchen garden garage attic office cellar bathroom library")
COUNTED = _words("apples pears plums eggs nuts lemons stamps marbles")
ORDERS = (
    ("older", "oldest", "youngest"), ("taller", "tallest", "shortest"), ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"), ("richer", "richest", "poorest"),
)  # fmt: skip
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
WORDS = _words(
    "garden window pencil bridge castle monkey basket flower silver market winter doctor kitten planet rocket button "
    "candle dragon engine forest hammer island jacket ladder mirror needle orange parrot ribbon saddle ticket valley "
    "wallet yellow animal bottle carpet donkey finger table river cloud house"
)
GROUPS = {
    "fruit": "apple pear banana grape mango apricot melon lemon fig pineapple",
    "animal": "dog horse tiger rabbit sheep wolf camel goat lion mouse",
    "tool": "hammer saw drill wrench chisel screwdriver spanner rake spade shovel",
    "colour": "red blue green yellow purple pink brown grey black white",
    "country": "France Japan Brazil Egypt Canada India Norway Kenya Peru Spain",
    "metal": "iron copper tin zinc lead nickel aluminium platinum steel titanium",
    "instrument": "piano violin flute trumpet drum guitar harp cello oboe clarinet",
    "vehicle": "car bus train bicycle truck tram van taxi lorry scooter",
    "vegetable": "carrot potato cabbage onion spinach broccoli turnip celery leek parsnip",
    "sport": "football tennis rugby hockey volleyball basketball swimming golf boxing baseball",
}
CAPITALS = (
    "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Austria Vienna, Greece Athens, "
    "Poland Warsaw, Hungary Budapest, Ireland Dublin, Norway Oslo, Sweden Stockholm, Denmark Copenhagen, Finland "
    "Helsinki, Russia Moscow, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Japan Tokyo, China Beijing, Thailand "
    "Bangkok, Iran Tehran, Iraq Baghdad, Cuba Havana, Peru Lima, Chile Santiago, Canada Ottawa, Belgium Brussels, "
    "Romania Bucharest, Bulgaria Sofia, Ukraine Kyiv, Vietnam Hanoi, Indonesia Jakarta, Syria Damascus"
)
OPPOSITES = (
    "hot cold, big small, old young, high low, fast slow, hard soft, light dark, rich poor, strong weak, early "
    "late, open closed, full empty, wet dry, clean dirty, good bad, happy sad, long short, thick thin, wide "
    "narrow, near far, up down, left right, day night, black white, inside outside, begin end, win lose, buy "
    "sell, push pull, love hate, friend enemy, war peace, life death, true false, summer winter, loud quiet, deep "
    "shallow, heavy light, sweet sour, cheap expensive, always never, first last, north south, east west, above "
    "below, before after"
)
PAST = (
    "go went, see saw, eat ate, drink drank, run ran, write wrote, take took, give gave, come came, find found, "
    "buy bought, bring brought, think thought, teach taught, catch caught, sing sang, swim swam, begin began, "
    "break broke, speak spoke, drive drove, ride rode, rise rose, fall fell, fly flew, grow grew, know knew, "
    "throw threw, draw drew, wear wore, tell told, sell sold, feel felt, keep kept, sleep slept, leave left, lose "
    "lost, meet met, hold held, stand stood, win won, choose chose, forget forgot, hide hid, bite bit, shake "
    "shook, steal stole, wake woke"
)
PLURALS = (
    "child children, man men, woman women, foot feet, tooth teeth, goose geese, mouse mice, leaf leaves, knife "
    "knives, wolf wolves, city cities, baby babies, box boxes, church churches, bus buses, potato potatoes, story "
    "stories, wife wives, half halves, party parties, dish dishes, fox foxes, lady ladies, life lives, country "
    "countries"
)


def documents() -> list[dict[str, Any]]:
    """Return all documents: `kind`, `start`, `choices`, and `answer`, the index of the right one."""
    found = []
    for kind, (draft, count) in KINDS.items():
        draw = Draw(f"{SEED} {kind}")
        starts: set[str] = set()
        while len(starts) < count:
            start, right, wrong = draft(draw)
            if start in starts:
                continue
            starts.add(start)
            others = draw.some(CHOICES - 1, sorted(set(wrong) - {right}))
            choices = draw.some(CHOICES, [right, *others])
            found.append({"kind": kind, "start": start, "choices": choices, "answer": choices.index(right)})
    return found


def dataset(**_: Any) -> dict[str, Any]:
    """Return the documents as lm_eval takes them, which hands over the task's own metadata."""
    import datasets

    return {"test": datasets.Dataset.from_list(documents())}


class Draw:
    """Draws from a seed by `Random.random()` alone."""

    def __init__(self, seed: str):
        self._random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def one(self, items: Sequence[Item]) -> Item:
        """Return one of the items."""
        return items[self.number(0, len(items) - 1)]

    def some(self, count: int, items: Sequence[Item]) -> list[Item]:
        """Return `count` different items in an order that is drawn."""
        left = list(items)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]


# -- the kinds -----------------------------------------------------------------------------------------------


def _other(draw: Draw, right: int) -> list[str]:
    """Return wrong numbers from near and far."""
    return [str(n) for n in range(max(0, right - 12), right + 13) if n != right][:: draw.number(2, 3)]


def _sum(draw: Draw) -> Draft:
    top = draw.one((9, 9, 20, 60))
    a, b = draw.number(1, top), draw.number(1, top)
    if draw.number(0, 1):
        return f"1 + 1 = 2. 3 + 5 = 8. {a} + {b} =", str(a + b), _other(draw, a + b)
    return f"2 - 1 = 1. 9 - 5 = 4. {a + b} - {a} =", str(b), _other(draw, b)


def _product(draw: Draw) -> Draft:
    a, b = draw.number(2, 12), draw.number(2, 12)
    return f"2 times 3 is 6. {a} times {b} is", str(a * b), [*_other(draw, a * b), str(a * (b + 1)), str((a - 1) * b)]


def _sequence(draw: Draw) -> Draft:
    first, step = draw.number(1, 30), draw.one((1, 2, 3, 4, 5, 10))
    row = [first + step * i for i in range(6)]
    return f"{', '.join(map(str, row[:5]))},", str(row[5]), [str(row[5] + i) for i in (-step, -1, 1, step, 2 * step)]


def _lookup(draw: Draw) -> Draft:
    people, colours, thing = draw.some(3, NAMES), draw.some(3, COLOURS), draw.one(THINGS)
    shown = " ".join(f"The {thing} of {who} is {colour}." for who, colour in zip(people, colours, strict=True))
    asked = draw.number(0, 2)
    unseen = draw.one([colour for colour in COLOURS if colour not in colours])
    return f"{shown} So the {thing} of {people[asked]} is", colours[asked], (*colours, unseen)


def _moved(draw: Draw) -> Draft:
    thing, who = draw.one(SMALL_THINGS), draw.one(NAMES)
    a, b, c, d = draw.some(4, PLACES)
    return f"The {thing} was in the {a}. {who} took it to the {b}. Now the {thing} is in the", b, (a, c, d)


def _order(draw: Draw) -> Draft:
    people, (more, most, least) = draw.some(4, NAMES), draw.one(ORDERS)
    a, b, c, _ = people
    word, right = draw.one(((most, a), (least, c)))
    return f"{a} is {more} than {b}. {b} is {more} than {c}. Of the three, the {word} is", right, people


def _story(draw: Draw) -> Draft:
    who, what, had, gave = draw.one(NAMES), draw.one(COUNTED), draw.number(6, 15), draw.number(1, 5)
    text = f"{who} had {had} {what} and gave {gave} away. The number of {what} that {who} has left is"
    return text, str(had - gave), [str(had + gave), *_other(draw, had - gave)]


def _letter(draw: Draw) -> Draft:
    word = draw.one(WORDS).upper()
    verb, index = draw.one((("begins", 0), ("ends", -1)))
    return f"The word {word} {verb} with the letter", word[index], LETTERS


def _after(draw: Draw) -> Draft:
    kind, row = draw.one(
        (("day", DAYS), ("month", MONTHS), ("letter", LETTERS), ("number", tuple(map(str, range(99)))))
    )
    index = draw.number(1, len(row) - 2)
    word, right = draw.one((("after", row[index + 1]), ("before", row[index - 1])))
    return f"The {kind} that comes right {word} {row[index]} is", right, [item for item in row if item != row[index]]


def _pattern(draw: Draw) -> Draft:
    a, b, c, d = draw.some(4, [*COLOURS, *THINGS, *PLACES])
    length = draw.number(1, 2)
    return f"{a}, {b}, {c}, {a}, {b}, {c}, {', '.join((a, b)[:length])},", (b, c)[length - 1], (a, b, c, d)


def _member(draw: Draw) -> Draft:
    group, *others = draw.some(4, list(GROUPS))
    return f"Asked what sort of thing it is: {draw.one(_words(GROUPS[group]))} is a kind of", group, others


def _of_table(text: str, table: str) -> Callable[[Draw], Draft]:
    """Return a kind of which each document asks for the second of a pair; other pairs' are the wrong ones."""
    pairs: Mapping[str, str] = dict(tuple(pair.split()) for pair in table.split(", "))  # type: ignore[misc]

    def draft(draw: Draw) -> Draft:
        key = draw.one(list(pairs))
        return text.format(key), pairs[key], list(pairs.values())

    return draft


# kind -> what drafts a document, and how many there are of it
KINDS: Mapping[str, tuple[Callable[[Draw], Draft], int]] = {
    "sum": (_sum, 120),
    "product": (_product, 80),
    "sequence": (_sequence, 120),
    "lookup": (_lookup, 150),
    "moved": (_moved, 150),
    "order": (_order, 100),
    "story": (_story, 100),
    "letter": (_letter, 60),
    "after": (_after, 120),
    "pattern": (_pattern, 100),
    "member": (_member, 80),
    "capital": (_of_table("The capital of {} is", CAPITALS), 30),
    "opposite": (_of_table("The opposite of {} is", OPPOSITES), 44),
    "past": (_of_table("Today I {}, yesterday I", PAST), 46),
    "plural": (_of_table("One {}, two", PLURALS), 24),
}
