"""Red-Eval: harmful questions x prompt templates -> model -> judge -> Attack Success Rate with intervals.

The benchmark of Bhardwaj and Poria (arXiv 2308.09662). A run reads from left to right:

    questions.py  templates.py        what is asked            (banks, digests)
    models.py  engine.py  batchfile.py  who answers, and how   (local batches, Inspect, batch files)
    clean.py  judges.py               what the answer is       (thoughts, verdicts)
    records.py                        what is kept             (flat, append-only JSON lines)
    score.py  statistics.py  report.py  what it amounts to
    run.py                            the two phases: all answers first, then every judge
"""
