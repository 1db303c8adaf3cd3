"""Plans and results for people: tables on the terminal, a progress bar while it runs."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from resta.coverage import readable_share
from resta.engine import Progress as OnProgress
from resta.engine import Result
from resta.forecast import plan_warnings
from resta.manifest import (
    Change,
    TensorFacts,
    describe_terms,
    judge,
    layer_of,
    result_warnings,
    total_change,
)
from resta.output import MARK
from resta.page import console, printable
from resta.plan import Plan

MOST_NAMES = 12
MOST_BANDS = 8  # rows into which the layers of a summary are gathered


@contextmanager
def merge_progress(plan: Plan, *, shown: bool) -> Iterator[OnProgress | None]:
    """Show bytes, tensors, rate and time left on stderr; yields what the merge is to call, or None."""
    if not shown:
        yield None
        return
    left = {step.name: step.slot.spec.nbytes for step in plan.steps}
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.fields[tensors]} tensors"), *columns, console=console(stderr=True)) as bar:
        task = bar.add_task("", total=sum(left.values()), tensors=f"0/{len(left)}")
        finished = 0

        def on_progress(name: str, nbytes: int) -> None:
            nonlocal finished
            left[name] -= nbytes
            finished += left[name] == 0
            bar.update(task, advance=nbytes, tensors=f"{finished}/{len(left)}")

        yield on_progress


def print_plan(plan: Plan, bytes_free: int) -> None:
    """Print what a merge would do."""
    actions = Counter("copied" if step.copies else "merged" if step.terms else "converted" for step in plan.steps)
    table = Table(title=printable(plan.recipe.equation), show_header=False, title_justify="left")
    for name, weights in plan.weights.items():
        commit = f" @ {weights.located.commit}" if weights.located.commit else ""
        table.add_row(printable(name), printable(f"{weights.located.folder}{commit}"))
    table.add_row("tensors", ", ".join(f"{count} {action}" for action, count in sorted(actions.items())))
    for term, coverage in zip(plan.recipe.terms, plan.coverage, strict=True):
        sparsify = f", DARE keeps {term.sparsify.density:g} ({term.sparsify.rescale})" if term.sparsify else ""
        table.add_row(printable(f"term {term.name or ''}".rstrip()), f"{term.scale:g} * ({term.delta}){sparsify}")
        share = readable_share(coverage.covered / max(coverage.parameters, 1))
        reached = f"{share} of {coverage.parameters:,} parameters"
        left_out = [f"not covered: {part}" for part in coverage.left_out]
        off = [f"not selected: {coverage.not_selected:,}, its scale is 0"] if coverage.not_selected else []
        table.add_row("  covers", printable("; ".join([reached, *left_out, *off])))
    table.add_row("reads", readable_bytes(plan.bytes_read))
    table.add_row("writes", f"{readable_bytes(plan.bytes_written)} in {len(plan.headers)} files")
    table.add_row("free disk", readable_bytes(bytes_free))
    table.add_row("copies beside", printable(", ".join(file.name for file in plan.auxiliary_files)))
    if plan.left_out:
        table.add_row("leaves out", printable(left_out_names(plan)))
    console().print(table)
    for caution in plan_warnings(plan):
        _print_warning(caution)


def _print_warning(sentence: str) -> None:
    console().print(Text.assemble(("warning:", "yellow"), f" {printable(sentence)}"))


def print_result(result: Result, seconds: float) -> None:
    """Print what a merge did to the layers, what rounding left of it, and what to do next."""
    terminal = console()
    terminal.print(_change_table(result))
    nbytes = result.plan.bytes_written
    rate = readable_bytes(nbytes / max(seconds, 1e-9))
    terminal.print(f"{readable_bytes(nbytes)} in {seconds:.1f} s ({rate}/s) -> {printable(result.out)}", soft_wrap=True)
    for term in describe_terms(result.plan, result.tensors):
        terminal.print(printable(_term_line(term)))
    terminal.print(printable(judge(result.plan, result.tensors).statement))
    for warning in result_warnings(result.plan, result.tensors):
        _print_warning(warning)
    if result.plan.left_out:
        terminal.print(f"left out:     {printable(left_out_names(result.plan))}", soft_wrap=True)
    terminal.print(f"check it:     {printable(audit_command(result))}", soft_wrap=True)


def print_conversion(result: Result, seconds: float) -> None:
    """Print what a conversion wrote, and what to do next."""
    terminal, nbytes = console(), result.plan.bytes_written
    size, rate = readable_bytes(nbytes), readable_bytes(nbytes / max(seconds, 1e-9))
    terminal.print(
        f"{len(result.tensors)} tensors, {size} in {seconds:.1f} s ({rate}/s) -> {printable(result.out)}",
        soft_wrap=True,
    )
    if result.plan.left_out:
        terminal.print(f"left out:     {printable(left_out_names(result.plan))}", soft_wrap=True)
    terminal.print(f"check it:     {printable(audit_command(result))}", soft_wrap=True)


def _term_line(term: Mapping[str, Any]) -> str:
    """Say what one term of a manifest reached, and what rounding left of it."""
    coverage, kept = term["coverage"], term["change"]["kept"]
    shares = [
        f"{words} {readable_share(coverage[key] / max(coverage['parameters'], 1))}"
        for key, words in (("covered", "covers"), ("not_covered", "not covered"), ("not_selected", "not selected"))
        if coverage[key] or key == "covered"
    ]
    rounding = "" if kept is None else f"; rounding kept {kept:.1%}"
    return f"{term['name'] or term['delta']}: {', '.join(shares)} of {coverage['parameters']:,} parameters{rounding}"


def digest_line(result: Result) -> str:
    """Say what the digests that were asked for took; of a merge that an earlier run completed, what that one wrote."""
    if result.digests is None:
        recorded = json.loads((result.out / MARK).read_bytes())["digests"]
        return f"digests:      {recorded}: so an earlier run wrote, which had only its last renames left"
    taken = result.digests
    return (
        f"digests:      SHA-256 of {len(taken.sha256)} files took {taken.core_s:.1f} s of one core; the rest waited "
        f"{taken.after_s:.1f} s for them at its end"
    )


def left_out_names(plan: Plan) -> str:
    """Name the files beside the weights that the result does not get, code among them."""
    shown, more = plan.left_out[:MOST_NAMES], len(plan.left_out) - MOST_NAMES
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def audit_command(result: Result) -> str:
    """Return the command that audits a merge; the manifest keeps no paths, so it says where local inputs lie."""
    flags = [
        f"--model {name}={shlex.quote(str(weights.located.folder))}"
        for name, weights in result.plan.weights.items()
        if not weights.located.commit
    ]
    return " ".join(["resta audit", shlex.quote(str(result.out)), *flags])


def _change_table(result: Result) -> Table:
    table = Table(title=printable(result.plan.recipe.equation), title_justify="left")
    table.add_column("layers")
    for heading in ("tensors", "change / weights", "entries changed", "cosine realised"):
        table.add_column(heading, justify="right")
    for band, change in bands(result.tensors).items():
        table.add_row(printable(band), *_cells(change))
    table.add_section()
    table.add_row("all", *_cells(total_change(result.tensors.values())))
    return table


def _cells(change: Change) -> tuple[str, ...]:
    return (
        str(change.tensors),
        f"{change.relative_size:.2e}",
        f"{change.changed:.1%}",
        "-" if change.cosine is None else f"{change.cosine:.3f}",
    )


def bands(facts: Mapping[str, TensorFacts]) -> dict[str, Change]:
    """Sum up the change by bands of neighbouring layers, at most eight, and by what lies outside the layers."""
    groups: dict[str, list[TensorFacts]] = {}
    for name, fact in facts.items():
        if fact.action == "merged":
            groups.setdefault(layer_of(name), []).append(fact)
    numbers = sorted(int(group.split()[1]) for group in groups if group.startswith("layer "))
    width = max(1, math.ceil(len(numbers) / MOST_BANDS))
    changes = {}
    for first in range(0, len(numbers), width):
        members = numbers[first : first + width]
        title = f"layers {members[0]}-{members[-1]}" if len(members) > 1 else f"layer {members[0]}"
        changes[title] = total_change(fact for number in members for fact in groups.pop(f"layer {number}"))
    return changes | {group: total_change(members) for group, members in groups.items()}


def readable_bytes(nbytes: float) -> str:
    """Return a size in decimal units, as disks are sold and the Hub shows."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError("unreachable")
