"""What can go wrong, as one tree; the exit code of each kind lives on its class.

    RestaError                  exit 1: the request was right, carrying it out failed
    ├── RequestError            exit 2: the request cannot be carried out as it stands; nothing was written
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
    │   └── MissingExtraError   an optional dependency is not installed
    ├── NonFiniteError          NaN or infinity in weights, where the recipe does not allow it
    ├── ResumeError             a partial output that belongs to another recipe, input or process
    ├── TrainingError           a training run that had to stop, such as one out of memory
    ├── EndpointError           a model server that does not answer, or not as its protocol says
    ├── UnansweredError         some questions got no answer; those that did are kept
    ├── DemoError               the demo ran, and did not show that safety was lost and regained
    └── AuditError              a finished output that is not what its manifest says

A message says which file or tensor, what was expected, what was found, and what to do.
"""

from __future__ import annotations


class RestaError(Exception):
    """The base of every error that resta raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class RequestError(RestaError):
    """The request is wrong; found before anything is written."""

    exit_code = 2


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


class ResumeError(RestaError):
    """A partial output that this command may not continue."""


class TrainingError(RestaError):
    """A training run that had to stop."""


class EndpointError(RestaError):
    """A model server that does not answer, or not as its protocol says."""


class UnansweredError(RestaError):
    """Some questions got no answer (an endpoint down, out of memory); the answers that came are kept."""


class DemoError(RestaError):
    """The demo ran, but what it measured does not show that safety was lost and regained."""


class AuditError(RestaError):
    """A finished output that differs from what its manifest and inputs say."""
