"""How fast are Red-Eval's answers? Our batcher against plain transformers, a loop of one, and Inspect's `hf`.

    python benchmarks/redeval_speed.py MODEL --out benchmarks/results/redeval_HARDWARE_YYYYMM.md

One run, one process, one model in memory, greedy, the same prompts for all: short questions and some five times as
long. `plain` is one padded call of `generate` after another, prompts in their given order, at the best of several
batch sizes, each tried once. Ours and plain at its best then take turns, and what counts is the median over these
pairs, by the clock and by CPU time: the second hardly knows of what else the machine does. The loop of one and
Inspect's provider are slow, so they get fewer prompts (the first ones); their rates are per answer and compare all the
same. Throughput is answers per second.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from inspect_ai import Task
from inspect_ai import eval as inspect_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, ModelInfo, get_model, set_model_info
from inspect_ai.solver import generate as inspect_generate

from resta.redeval import engine
from resta.redeval.messages import Decoding, Message, Rendering, Reply, Request
from resta.redeval.models import LocalModel, LocalSpec, generate, load_local
from resta.redeval.questions import read_bank
from resta.redeval.templates import read_template

NEW_TOKENS = 64
SWEEP = (32, 64, 100, 200)  # batch sizes of plain generate


def texts(count: int) -> list[str]:
    """Return prompts of mixed length, long and short ones in turn."""
    questions = [q.text for name in ("smoke", "smoke-safe") for q in read_bank(name).questions]
    cot = read_template("cot")
    padded = [
        cot.fill(f"{q} Think of " + "each of the people concerned, " * 12) if i % 4 == 0 else q
        for i, q in enumerate(questions)
    ]
    return (padded * (count // len(padded) + 1))[:count]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one way of answering took: seconds by the clock, of CPU over all threads, and pages faulted in."""

    seconds: float
    cpu_s: float
    faults: int


def timed(what: str, work: Callable[[], object]) -> Cost:
    """Return what some work cost, and show it on stderr as soon as it is known."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    cost = Cost(seconds=seconds, cpu_s=cpu_s, faults=after.ru_minflt - before.ru_minflt)
    print(f"{what}: {cost}", file=sys.stderr, flush=True)
    return cost


def requests(prompts: list[str]) -> list[Request]:
    return [Request(id=str(i), messages=(Message(role="user", content=text),)) for i, text in enumerate(prompts)]


def plain(local: LocalModel, prompts: list[str], rows: int) -> None:
    """One padded batch after another, in the given order."""
    decoding = Decoding(max_new_tokens=NEW_TOKENS)
    ready = [local.chat_prompt(request.id, request.messages, Rendering()) for request in requests(prompts)]
    for start in range(0, len(ready), rows):
        generate(local, ready[start : start + rows], decoding)


def ours(local: LocalModel, prompts: list[str]) -> tuple[Cost, tuple[float, float]]:
    """Return (cost in all, (seconds, CPU seconds) outside the model) of the whole path through engine and log."""
    inside = inside_cpu = 0.0
    real = local.answer

    def answer(*args: object, **given: object) -> object:
        nonlocal inside, inside_cpu
        start, cpu = time.perf_counter(), time.process_time()
        try:
            return real(*args, **given)  # type: ignore[arg-type]
        finally:
            inside += time.perf_counter() - start
            inside_cpu += time.process_time() - cpu

    local.answer = answer  # type: ignore[method-assign, assignment]
    replies: list[Reply] = []
    handle = engine.local_handle(local, Decoding(max_new_tokens=NEW_TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        cost = timed(
            "resta redeval",
            lambda: engine.ask_all(handle, requests(prompts), replies.append, log_dir=Path(folder), title="speed"),
        )
    local.answer = real  # type: ignore[method-assign]
    assert len(replies) == len(prompts)
    return cost, (cost.seconds - inside, cost.cpu_s - inside_cpu)


def inspect_hf(path: str, prompts: list[str]) -> Cost:
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
            "hf provider",
            lambda: inspect_eval(task, model=model, display="none", log_dir=folder, log_realtime=False, score=False),
        )


def by_plain(local: LocalModel, prompts: list[str], rows: int) -> Cost:
    return timed(f"plain, batches of {rows}", lambda: plain(local, prompts, rows))


def table(rows: list[tuple[str, int, list[Cost]]]) -> list[str]:
    """Return the lines of a table of (path, answers, costs of its runs): medians, the first row's rates over all."""
    lines = [
        "| path | prompts | runs | answers/s | CPU s per answer | faults per answer | resta redeval is | by CPU time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first: tuple[float, float] | None = None
    for name, answers, costs in rows:
        seconds = statistics.median(cost.seconds for cost in costs) / answers
        cpu_s = statistics.median(cost.cpu_s for cost in costs) / answers
        faults = statistics.median(cost.faults for cost in costs) / answers
        first = first or (seconds, cpu_s)
        lines.append(
            f"| {name} | {answers} | {len(costs)} | {1 / seconds:.2f} | {cpu_s:.2f} | {faults:.0f} "
            f"| {seconds / first[0]:.2f}x | {cpu_s / first[1]:.2f}x |"
        )
    return lines


def measure(path: str, count: int, few: int, rounds: int) -> list[str]:
    """Return the lines of the result table."""
    local = load_local(LocalSpec(model=path, device="cpu", dtype="float32"))
    prompts = texts(count)
    plain(local, prompts[:8], 8)  # warm up
    ours(local, prompts[:8])
    sweep = {rows: by_plain(local, prompts, rows) for rows in SWEEP if rows <= count}
    best = min(sweep, key=lambda rows: sweep[rows].seconds)
    pairs, outsides = [], []
    for turn in range(rounds):  # who begins changes, so that a machine that slows down favours nobody
        other = by_plain(local, prompts, best) if turn % 2 else None
        mine, outside = ours(local, prompts)
        pairs.append((mine, other or by_plain(local, prompts, best)))
        outsides.append(outside)
    loop = timed("loop of one", lambda: plain(local, prompts[:few], 1))
    provider = inspect_hf(path, prompts[:few])
    rows = [
        ("resta redeval, whole path with log", count, [mine for mine, _ in pairs]),
        *((f"plain generate, batches of {n}", count, [cost]) for n, cost in sweep.items() if n != best),
        (f"plain generate, batches of {best}", count, [other for _, other in pairs]),
        ("loop of one", few, [loop]),
        ("Inspect's hf provider", few, [provider]),
    ]
    return [
        *table(rows),
        "",
        f"Against plain generate at its best ({best} rows), median of {rounds} pairs: "
        f"{statistics.median(b.seconds / a.seconds for a, b in pairs):.2f}x by the clock (target 0.95x), "
        f"{statistics.median(b.cpu_s / a.cpu_s for a, b in pairs):.2f}x by CPU time. Each pair by the clock: "
        f"{', '.join(f'{b.seconds / a.seconds:.2f}' for a, b in pairs)}.",
        "Overhead per answer outside the model: "
        f"{1000 * statistics.median(clock for clock, _ in outsides) / count:.1f} ms by the clock (target 20 ms), "
        f"{1000 * statistics.median(cpu for _, cpu in outsides) / count:.1f} ms of CPU.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5, help="pairs of ours and plain")
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
        f"Command: `python benchmarks/redeval_speed.py {name} --prompts {given.prompts} --few {given.few} "
        f"--rounds {given.rounds}`",
        f"Load of the machine (1, 5, 15 minutes) as the run began: {', '.join(f'{x:.1f}' for x in os.getloadavg())}.",
        "",
        *measure(given.model, given.prompts, given.few, given.rounds),
    ]
    print("\n".join(lines))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
