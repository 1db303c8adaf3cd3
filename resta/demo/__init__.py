"""The demo: three tiny models made on the spot, one that lost its safety given it back, and the proof.

corpus.py    what is trained on and what is asked, from a grammar; no files
files.py     the same as files that `resta sft`, `resta redeval` and lm_eval read
models.py    base, aligned and tuned, trained by the sft module
run.py       the steps in order, and what was measured
"""
