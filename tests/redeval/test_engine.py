from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from resta.redeval.engine import IDLE_S, MicroBatcher, ask_all, local_handle
from resta.redeval.messages import Decoding, Message, Reply, Request
from resta.redeval.models import Generation, LocalSpec, Prompt, load_local

GREEDY = Decoding(max_new_tokens=1)


class Echo:
    """A model that answers with the prompt, in batches of three, longest first; it can be made to fail."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.error: Exception | None = None

    def take(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[int]:
        return sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))[:3]

    def answer(self, prompts: Sequence[Prompt], decoding: Decoding, *, whole_sequence: bool) -> list[Generation]:
        self.batches.append([prompt.text for prompt in prompts])
        if self.error:
            raise self.error
        return [Generation(prompt.text, "stop", len(prompt.ids), 1, 3) for prompt in prompts]


def ask_together(echo: Echo, texts: Sequence[str]) -> list[str]:
    batcher = MicroBatcher(echo)  # type: ignore[arg-type]
    found: dict[int, str] = {}

    async def one(i: int, text: str) -> None:
        found[i] = (await batcher.submit(Prompt(str(i), text, [0] * len(text)), GREEDY)).text

    async def everything() -> None:
        async with anyio.create_task_group() as group:
            for i, text in enumerate(texts):
                group.start_soon(one, i, text)

    anyio.run(everything)
    return [found[i] for i in range(len(texts))]


def test_everyone_gets_their_own_answer_from_few_batches_longest_first() -> None:
    echo = Echo()
    texts = ["x" * n for n in (3, 1, 7, 5, 2, 6, 4)]
    assert ask_together(echo, texts) == texts
    assert [[len(text) for text in batch] for batch in echo.batches] == [[7, 6, 5], [4, 3, 2], [1]]


def test_the_engine_fills_one_batch_with_all_that_fits(tiny: Path, tmp_path: Path) -> None:
    local = load_local(LocalSpec(model=str(tiny), device="cpu"))
    sizes: list[int] = []
    real = local.answer

    def answer(prompts: Sequence[Prompt], *args: Any, **given: Any) -> list[Generation]:
        sizes.append(len(prompts))
        return real(prompts, *args, **given)

    local.answer = answer  # type: ignore[method-assign]
    requests = [Request(id=str(i), messages=(Message(role="user", content=f"{i}?"),)) for i in range(60)]
    handle = local_handle(local, GREEDY)
    ask_all(handle, requests, lambda reply: None, log_dir=tmp_path, title="fill")
    assert sizes == [60]


def test_an_error_reaches_its_own_batch_and_the_next_one_still_runs() -> None:
    echo = Echo()
    echo.error = ValueError("broken")
    with pytest.raises(ExceptionGroup) as caught:
        ask_together(echo, ["a", "b"])
    assert caught.group_contains(ValueError, match="broken")
    echo.error = None
    assert ask_together(echo, ["a"]) == ["a"]


def test_a_cancelled_leader_hands_over() -> None:
    echo = Echo()
    batcher = MicroBatcher(echo)  # type: ignore[arg-type]
    found: list[Any] = []

    async def one(text: str, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            found.append((await batcher.submit(Prompt(text, text, [0]), GREEDY)).text)

    async def everything() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(one, "leader", IDLE_S / 2)
            group.start_soon(one, "waiting and cancelled", IDLE_S / 4)
            group.start_soon(one, "patient", math.inf)

    anyio.run(everything)
    assert found == ["patient"]
    assert echo.batches == [["patient"]]


def test_a_batch_is_passed_on_before_the_next_one_begins(tiny: Path, tmp_path: Path) -> None:
    local = load_local(LocalSpec(model=str(tiny), device="cpu", batch_rows=8))
    replies: list[Reply] = []
    kept, threads = [], set()
    real = local.answer

    def answer(*args: Any, **given: Any) -> list[Generation]:
        kept.append(len(replies))
        threads.add(threading.get_ident())
        return real(*args, **given)

    local.answer = answer  # type: ignore[method-assign]
    requests = [Request(id=str(i), messages=(Message(role="user", content=f"{i}?"),)) for i in range(20)]
    ask_all(local_handle(local, GREEDY), requests, replies.append, log_dir=tmp_path, title="pass on")
    assert kept == [0, 8, 16]
    assert threads == {threading.get_ident()}  # a worker thread is slower; see MicroBatcher
    assert local.tokenised == len(replies) == 20


def test_nothing_is_left_waiting_when_all_is_answered() -> None:
    echo = Echo()
    batcher = MicroBatcher(echo)  # type: ignore[arg-type]

    async def twice() -> None:
        for text in ("one", "two"):
            assert (await batcher.submit(Prompt(text, text, [0]), GREEDY)).text == text

    anyio.run(twice)
    assert batcher._waiting == []
    assert batcher._leader is None
