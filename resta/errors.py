"""What can go wrong, as one tree; the exit code of each kind lives on its class.

    RestaError                  exit 5: the request was right, carrying it out failed
    ├── RequestError            exit 2: the request cannot be carried out as it stands
    │   ├── HeaderError         a safetensors file whose header lies, or that is torn
    │   ├── CheckpointError     a model directory that is not a complete, readable checkpoint
    │   ├── AdapterError        a LoRA adapter that cannot be applied exactly
    │   ├── RecipeError         a recipe (or flags) that does not say one clear thing
    │   ├── PlanError           models that do not fit each other, the recipe, or the disk
    │   ├── DataError           conversations that are malformed, too few, or cannot be trained on
    │   ├── TemplateError       a tokenizer or chat template that cannot render or mask them exactly
    │   ├── BankError           a question bank or prompt template that cannot be used as it stands
    │   ├── JudgeError          a judge that is not declared clearly, or may not judge this model
    │   ├── TaskError           a utility task that is not known, or cannot be scored as it stands
    │   ├── PolicyError         a release policy that does not say one clear thing
    │   ├── CompareError        measurements that were not made alike, or not of the same things
    │   ├── ModelError          a model to ask that cannot be loaded or prompted
    │   ├── ResumeError         an output that is there already and that this command may not continue
    │   └── MissingExtraError   an optional dependency is not installed
    ├── Finding                 exit 1: all was carried out, and the answer is no
    │   ├── DemoError           the demo did not show that safety was lost and regained
    │   └── AuditError          a finished output is not what its manifest says
    ├── NonFiniteError          NaN or infinity in weights, where the recipe does not allow it
    ├── NoChangeError           a merge, or one of its terms, that changes nothing
    ├── ChangedError            an input that changed, or went away, while it was being read
    ├── TrainingError           a training run that had to stop, such as one out of memory
    ├── EndpointError           a model server that does not answer, or not as its protocol says
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
    FAILED: "the run failed; where it can go on, the same command goes on",
    INTERRUPTED: "interrupted",
}


class RestaError(Exception):
    """The base of every error that resta raises on purpose; `exit_code` is what the command line returns."""

    exit_code = FAILED


class RequestError(RestaError):
    """The request is wrong; what can be refused before anything is written is refused then."""

    exit_code = WRONG_REQUEST


class Finding(RestaError):
    """All was carried out, and the answer is no."""

    exit_code = NO


class HeaderError(RequestError):
    """A safetensors header that is malformed or disagrees with its file."""


class CheckpointError(RequestError):
    """A model directory that is not a complete, readable safetensors checkpoint."""


class AdapterError(RequestError):
    """A LoRA adapter that cannot be applied exactly."""


class RecipeError(RequestError):
    """A recipe or a set of flags that is not valid."""


class PlanError(RequestError):
    """Models that do not fit each other, the recipe, or the disk."""


class DataError(RequestError):
    """Training conversations that are malformed, too few, or cannot be trained on."""


class TemplateError(RequestError):
    """A tokenizer or chat template that cannot render or mask conversations exactly."""


class BankError(RequestError):
    """A question bank or prompt template that cannot be used as it stands."""


class JudgeError(RequestError):
    """A judge that is not declared clearly, or may not judge this model."""


class TaskError(RequestError):
    """A utility task that is not known, or cannot be scored per document."""


class PolicyError(RequestError):
    """A release policy that is not valid, or speaks of what is not measured."""


class CompareError(RequestError):
    """Measurements that may not be compared."""


class ModelError(RequestError):
    """A model to ask that cannot be loaded or prompted."""


class MissingExtraError(RequestError):
    """An optional dependency is not installed."""


class NonFiniteError(RestaError):
    """NaN or infinity where the recipe does not allow it."""


class NoChangeError(RestaError):
    """A merge that changes nothing, or a term of one that is zero everywhere: found only by the arithmetic."""


class ChangedError(RestaError):
    """An input that is no longer what it was when the merge was planned."""


class ResumeError(RequestError):
    """An output that is there already and that this command may not continue."""


class TrainingError(RestaError):
    """A training run that had to stop."""


class EndpointError(RestaError):
    """A model server that does not answer, or not as its protocol says."""


class UnansweredError(RestaError):
    """Some questions got no answer (an endpoint down, out of memory); the answers that came are kept."""


class DemoError(Finding):
    """The demo ran, but what it measured does not show that safety was lost and regained."""


class AuditError(Finding):
    """A finished output that differs from what its manifest and inputs say."""
