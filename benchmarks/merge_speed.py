"""How long a merge takes, and how much memory: `resta merge` against the disk, a naive script and mergekit.

Makes three synthetic bf16 Llama checkpoints (base, aligned = base + noise, tuned = base + noise) in two sizes,
and measures whole processes on them, alternating, process start included. Before every run the earlier output
is deleted, `sync` has returned, and the inputs are in the page cache (or, with --cold, nothing is).

The floor is the least that any merge does: read base and aligned, copy tuned, and wait until the copy is on the
disk. Only resta and the floor make their output durable; the others return while it is still in memory.

This process imports the standard library alone: a child's peak memory is counted from its parent's at the fork.

    python benchmarks/merge_speed.py --data /tmp/bench --mergekit ~/venv-mergekit/bin/mergekit-yaml \
        --report-cost --output benchmarks/results/merge_speed.md
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

SEED = 20261123
SHARDS = 3
MODELS = ("base", "aligned", "tuned")
SCALE, DENSITY = 0.5, 0.7
DROP_CACHES = Path("/proc/sys/vm/drop_caches")

NAIVE = """
import json, shutil, sys
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import save_file
base, aligned, tuned, out = map(Path, sys.argv[1:5])
scale = float(sys.argv[5])
index = json.loads((tuned / "model.safetensors.index.json").read_text())["weight_map"]
def opened(folder):
    files = sorted(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()))
    return {name: handle for file in files for handle in [safe_open(folder / file, "pt")] for name in handle.keys()}
models = [opened(folder) for folder in (base, aligned, tuned)]
out.mkdir()
for shard in sorted(set(index.values())):
    merged = {}
    for name in (name for name, file in index.items() if file == shard):
        b, a, t = (model[name].get_tensor(name) for model in models)
        merged[name] = (t.float() + scale * (a.float() - b.float())).to(t.dtype)
    save_file(merged, out / shard, metadata={"format": "pt"})
for file in tuned.iterdir():
    if file.suffix != ".safetensors":
        shutil.copy(file, out)
"""

# Bars: (contestant, other, whether the contestant may take at most, or must be at least, so many times it).
BARS = {
    ("big", False): [
        ("plain", "floor", 1.5),
        ("dare", "floor", 1.8),
        ("naive", "plain", 3.0),
        ("task_arithmetic", "plain", 5.0),
        ("dare_linear", "dare", 8.0),
    ],
    ("big", True): [("plain", "floor", 1.15)],
}
MAX_RSS_MB, MAX_RSS_SPREAD, MAX_SMALL_S = 400, 1.1, 3.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama architecture; its bf16 checkpoint has about `gigabytes`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    gigabytes: float

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        hidden, narrow = self.hidden, self.hidden // self.heads * self.key_value_heads
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (self.intermediate, hidden),
            "mlp.up_proj": (self.intermediate, hidden),
            "mlp.down_proj": (hidden, self.intermediate),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, hidden)}
        for number in range(self.layers):
            shapes |= {f"model.layers.{number}.{part}.weight": shape for part, shape in layer.items()}
        return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocabulary, hidden)}


SHAPES = {
    "small": Shape(
        hidden=1024,
        intermediate=4096,
        layers=16,
        heads=16,
        key_value_heads=8,
        vocabulary=24000,
        gigabytes=0.6,
    ),
    "big": Shape(
        hidden=2048,
        intermediate=8192,
        layers=22,
        heads=32,
        key_value_heads=8,
        vocabulary=40000,
        gigabytes=3.0,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """What is run, and what the table calls it."""

    name: str
    title: str
    command: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured process. `other_s` is CPU time that the machine spent on anything else meanwhile."""

    size: str
    cold: bool
    series: str
    contestant: str
    wall_s: float
    cpu_s: float
    rss_mb: float
    other_s: float


# --- data


def generate(data: Path, size: str) -> None:
    """Write base, aligned and tuned; the same seed gives the same bytes."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    shape = SHAPES[size]
    shards = share_out(shape.tensors())
    for model in MODELS:
        (data / size / model).mkdir(parents=True, exist_ok=True)
        write_json(data / size / model / "config.json", shape.config())
        index = {name: file for file, tensors in shards.items() for name in tensors}
        total = sum(2 * torch.Size(dims).numel() for dims in shape.tensors().values())
        write_json(
            data / size / model / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )
    number = 0
    for file, tensors in shards.items():
        held: dict[str, dict[str, torch.Tensor]] = {model: {} for model in MODELS}
        for name, dims in tensors.items():
            number += 1
            random = torch.Generator().manual_seed(SEED + number)
            base = torch.randn(dims, generator=random) * 0.02
            held["base"][name] = base.bfloat16()
            for model in MODELS[1:]:
                noise = torch.randn(dims, generator=random)
                held[model][name] = noise.mul_(0.001).add_(base).bfloat16()
        for model in MODELS:
            save_file(held[model], data / size / model / file, metadata={"format": "pt"})
    write_json(data / size / "complete.json", stamp(size))


def share_out(tensors: dict[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Split the tensors, in order, over shards of about the same size."""
    counts = {name: shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in tensors.items()}
    total, seen = sum(counts.values()), 0
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        number = min(SHARDS, seen * SHARDS // total + 1)
        shards.setdefault(f"model-{number:05d}-of-{SHARDS:05d}.safetensors", {})[name] = shape
        seen += counts[name]
    return shards


def stamp(size: str) -> dict[str, object]:
    return {"seed": SEED, "shards": SHARDS, "shape": asdict(SHAPES[size])}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def prepare(data: Path, size: str) -> None:
    """Make the checkpoints unless they are there, and check that there is room for them and for one output."""
    complete = data / size / "complete.json"
    there = complete.is_file() and json.loads(complete.read_text()) == stamp(size)
    data.mkdir(parents=True, exist_ok=True)
    needed = (1 if there else 4) * SHAPES[size].gigabytes * 1e9 + 1e9
    free = shutil.disk_usage(data).free
    if free < needed:
        raise SystemExit(f"{data}: {needed / 1e9:.1f} GB must be free, {free / 1e9:.1f} GB are")
    if there:
        return
    print(f"making the {size} checkpoints in {data / size}", file=sys.stderr)
    shutil.rmtree(data / size, ignore_errors=True)
    in_a_child(generate, data, size)


def in_a_child(function: Callable[..., None], *arguments: object) -> None:
    """Call a function that needs memory in a process of its own, so that this one stays small."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join()
    if child.exitcode != 0:
        raise SystemExit(f"{function.__name__} failed")


# --- contestants


def contestants(data: Path, size: str, workers: int, mergekit: Path | None) -> list[Contestant]:
    """Return everything that is measured, with `data/out` as the output of each."""
    base, aligned, tuned = (str(data / size / model) for model in MODELS)
    out = str(data / "out")
    merge = [str(Path(sys.executable).with_name("resta")), "merge", tuned, "--aligned", aligned, "--base", base]
    merge += ["--scale", str(SCALE), "--workers", str(workers), "-o", out, "--quiet"]
    q = shlex.quote
    floor = f"cat {q(base)}/*.safetensors {q(aligned)}/*.safetensors > /dev/null && cp -r {q(tuned)} {q(out)}"
    found = [
        Contestant(
            name="floor",
            title="floor: cat base aligned > /dev/null; cp -r tuned out; sync out/*",
            command=("sh", "-c", f"{floor} && sync {q(out)}/* {q(out)}"),
        ),
        Contestant(name="plain", title="resta merge", command=tuple(merge)),
        Contestant(
            name="dare",
            title=f"resta merge, DARE at density {DENSITY}",
            command=(*merge, "--dare-density", str(DENSITY), "--dare-on", "tuned"),
        ),
        Contestant(
            name="naive",
            title="naive script",
            command=(sys.executable, "-c", NAIVE, base, aligned, tuned, out, str(SCALE)),
        ),
    ]
    if mergekit:
        for method in ("task_arithmetic", "dare_linear"):
            recipe = data / f"{method}_{size}.yaml"
            recipe.write_text(mergekit_recipe(method, base, aligned, tuned))
            command = (str(mergekit), str(recipe), out)
            found.append(Contestant(name=method, title=f"mergekit {method}, default flags", command=command))
    return found


def mergekit_recipe(method: str, base: str, aligned: str, tuned: str) -> str:
    """Return the same sum in mergekit's words; JSON is YAML."""
    thinned = {"density": DENSITY} if method == "dare_linear" else {}
    whole = {"density": 1.0} if method == "dare_linear" else {}
    return json.dumps(
        {
            "merge_method": method,
            "base_model": base,
            "models": [
                {"model": tuned, "parameters": {"weight": 1.0, **thinned}},
                {"model": aligned, "parameters": {"weight": SCALE, **whole}},
            ],
            "dtype": "bfloat16",
        }
    )


# --- measuring


def measure(contestant: Contestant, data: Path, size: str, *, cold: bool, series: str) -> Run:
    """Run one process from a clean state and check that it wrote a model of the right size."""
    out = data / "out"
    clear(out)
    settle(data / size, cold=cold)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    busy = machine_cpu_s()
    begin = time.perf_counter()
    with (data / "log.txt").open("wb") as log:
        process = subprocess.Popen(contestant.command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    cpu = usage.ru_utime + usage.ru_stime
    other = machine_cpu_s() - busy - cpu
    process.returncode = os.waitstatus_to_exitcode(status)
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    expected = sum(file.stat().st_size for file in (data / size / "tuned").glob("*.safetensors"))
    if process.returncode != 0 or abs(written - expected) > 0.001 * expected:
        log_end = (data / "log.txt").read_text(errors="replace")[-2000:]
        raise SystemExit(f"{contestant.name}: exit {process.returncode}, {written} bytes written\n{log_end}")
    clear(out)
    return Run(
        size=size,
        cold=cold,
        series=series,
        contestant=contestant.name,
        wall_s=wall,
        cpu_s=cpu,
        rss_mb=usage.ru_maxrss / 1e3 * 1.024,
        other_s=max(0.0, other),
    )


def clear(out: Path) -> None:
    for path in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(path, ignore_errors=True)


def settle(inputs: Path, *, cold: bool) -> None:
    """Bring disk and page cache to the state that every run begins with."""
    os.sync()
    if cold:
        DROP_CACHES.write_text("3\n")
        time.sleep(1)
        return
    files = sorted(str(path) for path in inputs.glob("*/*.safetensors"))
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)


def machine_cpu_s() -> float:
    """Return the CPU time that all processes of this machine have used, stolen time included."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def alternate(chosen: list[Contestant], data: Path, size: str, *, cold: bool, runs: int) -> Iterable[Run]:
    """Yield `runs` rounds over the contestants, each beginning with the next one of them."""
    for number in range(runs):
        series = f"{datetime.datetime.now():%Y-%m-%dT%H:%M:%S}-{number}"
        turn = number % len(chosen)
        for contestant in chosen[turn:] + chosen[:turn]:
            run = measure(contestant, data, size, cold=cold, series=series)
            print(f"{size:6}{contestant.name:16}{run.wall_s:7.2f} s wall{run.cpu_s:8.2f} s CPU", file=sys.stderr)
            yield run


def report_cost(data: Path, size: str, result: Path) -> None:
    """Time the arithmetic of a whole merge in one thread, with and without the realised-change report."""
    from resta.checkpoint import Reader
    from resta.compute import CHUNK, Workspace
    from resta.engine import settle
    from resta.plan import make_plan
    from resta.shorthand import Roles, Shorthand, to_recipe

    models = {model: str(data / size / model) for model in MODELS}
    seconds: dict[str, list[float]] = {}
    for name, density in (("plain", None), ("dare", DENSITY)):
        choices = {"output": {"files_from": "tuned"}}
        plan = make_plan(
            to_recipe(Shorthand(roles=Roles(**models), scale=SCALE, dare_density=density, choices=choices))
        )
        identities = {path: identity for weights in plan.weights.values() for path, identity in weights.files.items()}
        with Reader(identities) as reader:
            workspace = Workspace(reader)
            steps = settle(plan, reader, 1).steps
            for measured in (False, True, True, False, False, True):
                begin = time.process_time()
                for step in steps:
                    for first in range(0, step.slot.spec.count, CHUNK):
                        count = min(CHUNK, step.slot.spec.count - first)
                        workspace.run(step, first, count, measure=measured)
                seconds.setdefault(f"{name} {measured}", []).append(time.process_time() - begin)
    write_json(result, seconds)


# --- the report


def table(runs: list[Run], found: list[Contestant], size: str, *, cold: bool) -> list[str]:
    """Return the Markdown lines for one size and one state of the page cache."""
    rows = {item: [run for run in runs if run.contestant == item.name] for item in found}
    rows = {item: own for item, own in rows.items() if own}
    shape = SHAPES[size]
    state = "cold" if cold else "hot"
    lines = [
        f"## Three {shape.gigabytes:g} GB models, {state} page cache",
        "",
        "| | runs | wall s | CPU s | peak RSS MB | times the floor | times resta merge | other load, CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for item, own in rows.items():
        cells = [
            item.title,
            str(len(own)),
            spread([run.wall_s for run in own]),
            spread([run.cpu_s for run in own]),
            f"{max(run.rss_mb for run in own):.0f}",
            ratio_text(runs, item.name, "floor"),
            ratio_text(runs, item.name, "plain"),
            f"{statistics.median(run.other_s for run in own):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def ratios(runs: list[Run], one: str, other: str) -> list[float]:
    """Return the wall-time ratios of the rounds in which both ran."""
    by_series: dict[str, dict[str, float]] = {}
    for run in runs:
        by_series.setdefault(run.series, {})[run.contestant] = run.wall_s
    return [walls[one] / walls[other] for walls in by_series.values() if one in walls and other in walls]


def ratio_text(runs: list[Run], one: str, other: str) -> str:
    values = ratios(runs, one, other)
    return f"{statistics.median(values):.2f}" if values and one != other else ""


def bars(runs: list[Run]) -> list[str]:
    """Return one line for every bar that these runs can be held against."""
    lines = []
    for (size, cold), wanted in BARS.items():
        own = [run for run in runs if (run.size, run.cold) == (size, cold)]
        for one, other, bar in wanted:
            values = ratios(own, one, other)
            if values:
                median = statistics.median(values)
                at_most = other == "floor"
                met = median <= bar if at_most else median >= bar
                text = f"{one} / {other}, {'cold, ' if cold else ''}{'at most' if at_most else 'at least'} {bar:g}"
                lines.append(f"| {text} | {median:.2f} | {len(values)} | {verdict(met)} |")
    hot = [run for run in runs if not run.cold and run.contestant in ("plain", "dare")]
    for name in ("plain", "dare"):
        small, big = ([run for run in hot if (run.contestant, run.size) == (name, size)] for size in SHAPES)
        if big:
            most = max(run.rss_mb for run in big)
            text = f"{name}: peak RSS at most {MAX_RSS_MB} MB"
            lines.append(f"| {text} | {most:.0f} | {len(big)} | {verdict(most <= MAX_RSS_MB)} |")
        if small:
            wall = statistics.median(run.wall_s for run in small)
            text = f"{name}: three 0.6 GB models under {MAX_SMALL_S:g} s"
            lines.append(f"| {text} | {wall:.2f} | {len(small)} | {verdict(wall < MAX_SMALL_S)} |")
        if small and big:
            grown = max(run.rss_mb for run in big) / max(run.rss_mb for run in small)
            met = 1 / MAX_RSS_SPREAD <= grown <= MAX_RSS_SPREAD
            text = f"{name}: peak RSS of big / small within {MAX_RSS_SPREAD:g}"
            lines.append(f"| {text} | {grown:.2f} | {len(small) + len(big)} | {verdict(met)} |")
    if not lines:
        return []
    return ["## Bars", "", "| bar | measured | runs | |", "|---|---|---|---|", *lines, ""]


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def cost_lines(path: Path, runs: list[Run]) -> list[str]:
    """Return what the realised-change report costs, as shares of the merge's CPU time."""
    seconds = {key: statistics.median(values) for key, values in json.loads(path.read_text()).items()}
    size = "big" if any(run.size == "big" for run in runs) else "small"
    lines = [f"## Cost of the realised-change report ({size}, kernels and reads in one thread)", ""]
    lines += ["| | without, CPU s | with, CPU s | share of the merge's CPU time |", "|---|---|---|---|"]
    for name in ("plain", "dare"):
        own = [run.cpu_s for run in runs if (run.contestant, run.size, run.cold) == (name, size, False)]
        off, on = seconds[f"{name} False"], seconds[f"{name} True"]
        share = f"{(on - off) / statistics.median(own):.1%}" if own else ""
        lines.append(f"| {name} | {off:.2f} | {on:.2f} | {share} |")
    return [*lines, ""]


def environment_lines(options: argparse.Namespace) -> list[str]:
    """Return where, when and with what this was measured."""
    versions = ["resta", "numpy", "numba", "torch", "safetensors"]
    ours = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in versions)
    commit = output_of(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])
    lines = [
        "# Merge speed and memory",
        "",
        f"- date: {datetime.date.today()}",
        f"- hardware: {hardware(options.data)}",
        f"- system: {platform.system()} {platform.release()}, {output_of(['cp', '--version']).splitlines()[0]}",
        f"- versions: Python {platform.python_version()}, {ours}; resta at commit {commit}",
    ]
    if options.mergekit:
        ask = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('mergekit', 'torch')), sep=', ')"
        lines.append(f"- mergekit's environment: {output_of([str(options.mergekit.with_name('python')), '-c', ask])}")
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    lines += [f"- command: `{command}`"]
    lines += [
        "- medians (min to max) of whole processes, process start included; ratios are medians over the rounds; "
        'peak RSS is the largest; "other load" is CPU time spent outside the measured process meanwhile, '
        "the kernel's writing back included",
        "",
    ]
    return lines


def hardware(data: Path) -> str:
    models = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    disk = output_of(["df", "--output=source,fstype,size", "--block-size=GB", str(data)]).splitlines()[-1]
    return f"{models[0]}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB memory, disk {' '.join(disk.split())}"


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


# --- the command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of the checkpoints; made once, reused")
    parser.add_argument("--runs", type=int, default=5, help="rounds over all contestants (default 5)")
    parser.add_argument("--only", choices=list(SHAPES), help="one size instead of both")
    parser.add_argument("--workers", type=int, default=2, help="threads of resta merge (default 2)")
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each run (needs root)")
    parser.add_argument("--mergekit", type=Path, metavar="PATH", help="mergekit-yaml of another environment")
    parser.add_argument("--contestants", help="comma-separated: floor,plain,dare,naive,task_arithmetic,dare_linear")
    parser.add_argument("--report-cost", action="store_true", help="also time the realised-change report")
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE.jsonl",
        help="keep each measurement here; the table then tells of all in the file, so that a series can be cut",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the report here as well")
    options = parser.parse_args()
    options.data = options.data.absolute()
    if options.cold and not os.access(DROP_CACHES, os.W_OK):
        parser.error(f"--cold: {DROP_CACHES} cannot be written; only root can empty the page cache")
    return options


def main() -> None:
    options = parse()
    runs = []
    if options.record and options.record.exists():
        runs = [Run(**json.loads(line)) for line in options.record.read_text().splitlines()]
    found: dict[str, list[Contestant]] = {}
    for size in [options.only] if options.only else SHAPES:
        prepare(options.data, size)
        found[size] = contestants(options.data, size, options.workers, options.mergekit)
        wanted = options.contestants.split(",") if options.contestants else [item.name for item in found[size]]
        chosen = [item for item in found[size] if item.name in wanted]
        for item in chosen if options.runs else []:
            if item.name in ("plain", "dare"):  # once, unmeasured: numba compiles its kernels and keeps them
                measure(item, options.data, size, cold=False, series="")
        for run in alternate(chosen, options.data, size, cold=options.cold, runs=options.runs):
            runs.append(run)
            if options.record:
                with options.record.open("a") as record:
                    record.write(json.dumps(asdict(run)) + "\n")
    report = [*environment_lines(options)]
    for size, items in found.items():
        for cold in (False, True):
            own = [run for run in runs if (run.size, run.cold) == (size, cold)]
            report += table(own, items, size, cold=cold) if own else []
    report += bars(runs)
    if options.report_cost:
        size = "small" if options.only == "small" else "big"
        in_a_child(report_cost, options.data, size, options.data / "report_cost.json")
        report += cost_lines(options.data / "report_cost.json", runs)
    text = "\n".join(report)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
