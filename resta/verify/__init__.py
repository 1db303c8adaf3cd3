"""The pre-release gate: safety restored, utility kept, no over-refusal."""
