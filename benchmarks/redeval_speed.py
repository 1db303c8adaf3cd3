"""How fast are Red-Eval's answers? Our batcher against plain transformers, a loop of one, and Inspect's `hf`.

    python benchmarks/redeval_speed.py MODEL --out benchmarks/results/redeval_HARDWARE_YYYYMM.md

One run, one process, one model in memory, greedy, the same prompts for all: short questions and some five
times as long. `plain` is one padded call of `generate` after another, prompts in their given order, at the
best of several batch sizes. The loop of one and Inspect's provider are slow, so they get fewer prompts (the
first ones); their rates are per answer and compare all the same. Throughput is answers per second.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch
from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, ModelInfo, get_model, set_model_info
from inspect_ai.solver import generate as inspect_generate

from resta.redeval import engine
from resta.redeval.asks import Ask, Decoding, Message, Rendering, Reply
from resta.redeval.models import LocalModel, LocalSpec, generate, load_local
from resta.redeval.questions import read_bank
from resta.redeval.templates import read_template

Result = TypeVar("Result")
NEW_TOKENS = 64
SWEEP = (32, 64)  # batch sizes of plain generate


def texts(count: int) -> list[str]:
    """Return prompts of mixed length, long and short ones in turn."""
    questions = [q.text for name in ("smoke", "smoke-safe") for q in read_bank(name).questions]
    cot = read_template("cot")
    padded = [
        cot.fill(f"{q} Think of " + "each of the people concerned, " * 12) if i % 4 == 0 else q
        for i, q in enumerate(questions)
    ]
    return (padded * (count // len(padded) + 1))[:count]


def said(what: str, work: Callable[[], Result]) -> Result:
    """Return the result of some work, and show it on stderr as soon as it is there."""
    result = work()
    print(f"{what}: {result}", file=sys.stderr, flush=True)
    return result


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def asks(prompts: list[str]) -> list[Ask]:
    return [Ask(id=str(i), messages=(Message(role="user", content=text),)) for i, text in enumerate(prompts)]


def plain(local: LocalModel, prompts: list[str], rows: int) -> None:
    """One padded batch after another, in the given order."""
    decoding = Decoding(max_new_tokens=NEW_TOKENS)
    ready = [local.chat_prompt(ask.id, ask.messages, Rendering()) for ask in asks(prompts)]
    for start in range(0, len(ready), rows):
        generate(local, ready[start : start + rows], decoding)


def ours(local: LocalModel, prompts: list[str]) -> tuple[float, float]:
    """Return (seconds in all, seconds inside the model) for the whole path through the engine and its log."""
    inside = 0.0
    real = local.answer

    def answer(*args: object, **given: object) -> object:
        nonlocal inside
        start = time.perf_counter()
        try:
            return real(*args, **given)  # type: ignore[arg-type]
        finally:
            inside += time.perf_counter() - start

    local.answer = answer  # type: ignore[method-assign, assignment]
    replies: list[Reply] = []
    handle = engine.local_handle(local, Decoding(max_new_tokens=NEW_TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        seconds = timed(
            lambda: engine.ask_all(handle, asks(prompts), replies.append, log_dir=Path(folder), title="speed")
        )
    local.answer = real  # type: ignore[method-assign]
    assert len(replies) == len(prompts)
    return seconds, inside


def inspect_hf(path: str, prompts: list[str]) -> float:
    """Inspect's own provider at its default batch size, without its second load and second BOS."""
    set_model_info(f"hf/{path}", ModelInfo(context_length=8192))
    model = get_model(
        f"hf/{path}",
        config=GenerateConfig(max_tokens=NEW_TOKENS),
        memoize=False,
        device="cpu",
        dtype="float32",
        do_sample=False,
        tokenizer_call_args={"add_special_tokens": False},
    )
    task = Task(dataset=MemoryDataset([Sample(input=text) for text in prompts]), solver=inspect_generate())
    with tempfile.TemporaryDirectory() as folder:
        return timed(
            lambda: inspect_eval(task, model=model, display="none", log_dir=folder, log_realtime=False, score=False)
        )


def measure(path: str, count: int, few: int) -> list[str]:
    """Return the lines of the result table."""
    local = load_local(LocalSpec(model=path, device="cpu", dtype="float32"))
    prompts = texts(count)
    plain(local, prompts[:8], 8)  # warm up
    ours(local, prompts[:8])
    seconds, inside = said("resta redeval", lambda: ours(local, prompts))
    rate = count / seconds
    sweep = {
        rows: count / said(f"plain {rows}", functools.partial(timed, functools.partial(plain, local, prompts, rows)))
        for rows in SWEEP
    }
    best = max(sweep, key=lambda rows: sweep[rows])
    loop = few / said("loop of one", lambda: timed(lambda: plain(local, prompts[:few], 1)))
    provider = few / said("hf provider", lambda: inspect_hf(path, prompts[:few]))
    rows = [
        ("resta redeval, whole path with log", count, rate),
        *((f"plain generate, batches of {n}", count, value) for n, value in sweep.items()),
        ("loop of one", few, loop),
        ("Inspect's hf provider", few, provider),
    ]
    lines = ["| path | prompts | answers/s | resta redeval is |", "|---|---|---|---|"]
    lines += [f"| {name} | {n} | {value:.2f} | {rate / value:.2f}x |" for name, n, value in rows]
    overhead = 1000 * (seconds - inside) / count
    lines += [
        "",
        f"Against plain generate at its best ({best} rows): {rate / sweep[best]:.2f}x (target 0.95x).",
    ]
    return [*lines, f"Overhead per answer outside the model: {overhead:.1f} ms (target 20 ms)."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--few", type=int, default=32, help="prompts for the slow paths")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("torch", "transformers", "inspect-ai"))
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x][:1]
    machine = f"{platform.machine()}{''.join(x.split(':')[1] for x in cpu)}, {os.cpu_count()} cores"
    name = Path(given.model).name
    lines = [
        "# Red-Eval: answers per second",
        "",
        f"{name}, {NEW_TOKENS} new tokens, float32, greedy; {date.today()}; {machine}, "
        f"{torch.get_num_threads()} threads; Python {platform.python_version()}, {versions}.",
        f"Command: `python benchmarks/redeval_speed.py {name} --prompts {given.prompts} --few {given.few}`",
        "",
        *measure(given.model, given.prompts, given.few),
    ]
    print("\n".join(lines))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
