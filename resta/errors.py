"""What can go wrong, as one tree; the exit code of each kind lives on its class.

    RestaError                  exit 5: the request was right, carrying it out failed
    ├── RequestError            exit 2: the request cannot be carried out as it stands
    │   └── ResumeError         an output exists already, and this command may not continue it
    ├── CheckFailedError        exit 1: all was carried out, and the answer is no
    ├── NonFiniteError          NaN or infinity in weights, where the recipe does not allow it
    ├── NoChangeError           a merge, or one of its terms, that changes nothing
    ├── ChangedError            an input that changed, or went away, while it was being read
    └── UnansweredError         some questions got no answer; those that did are kept

The exit codes of every command, EXIT_CODES. 1 is never a failure to work: a CI can tell "no" from "could not say".

A message says which file or tensor, what was expected, what was found, and what to do.
"""

from __future__ import annotations

DONE, NO, WRONG_REQUEST, FAILED, INTERRUPTED = 0, 1, 2, 5, 130  # 130: what shells return for Ctrl-C
EXIT_CODES = {
    DONE: "done; of verify: PASS",
    NO: "the answer is no: verify FAIL, sweep no candidate passes, audit a difference, demo its point not shown",
    WRONG_REQUEST: "wrong request",
    3: "verify: INCONCLUSIVE",
    4: "verify: INVALID",
    FAILED: "the run failed; if it can be continued, the same command continues it",
    INTERRUPTED: "interrupted",
}


class RestaError(Exception):
    """The base of every error that resta raises on purpose; `exit_code` is what the command line returns."""

    exit_code = FAILED


class RequestError(RestaError):
    """The request is wrong; what can be refused before anything is written is refused then."""

    exit_code = WRONG_REQUEST


class ResumeError(RequestError):
    """An output that is there already and that this command may not continue."""


class CheckFailedError(RestaError):
    """All was carried out, and the answer is no: an output is not what its manifest says, a demo did
    not show its point.
    """

    exit_code = NO


class NonFiniteError(RestaError):
    """NaN or infinity where the recipe does not allow it."""


class NoChangeError(RestaError):
    """A merge that changes nothing, or a term of one that is zero everywhere: found only by the arithmetic."""


class ChangedError(RestaError):
    """An input that is no longer what it was when the merge was planned."""


class UnansweredError(RestaError):
    """Some questions got no answer (an endpoint down, out of memory); the answers that came are kept."""


# Former names, which no code told apart: what was raised under them is raised as these. They last one release.
AdapterError = BankError = CheckpointError = CompareError = DataError = HeaderError = JudgeError = RequestError
MissingExtraError = ModelError = PlanError = PolicyError = RecipeError = TaskError = TemplateError = RequestError
AuditError = DemoError = Finding = CheckFailedError
EndpointError = UnansweredError
TrainingError = RestaError
