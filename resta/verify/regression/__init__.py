"""The regression check: a generated utility task (made.py makes its documents, regression.yaml tells lm_eval)."""
