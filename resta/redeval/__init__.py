"""Red-Eval: harmful questions x prompt templates -> model -> judge -> Attack Success Rate with intervals.

The benchmark of Bhardwaj and Poria (arXiv 2308.09662). A run reads from left to right:

    questions.py  templates.py               what is asked           banks, prompts, digests
    targets.py  models.py                    who is asked            local models in batches, or a server
    engine.py  batchfile.py  wire.py         how it gets there       Inspect, or a file for elsewhere
    plan.py  clean.py                        phase one: answers      protocols, thoughts
    judging.py  judges.py  control.py        phase two: verdicts     declarations in judge/*.yaml, known answers
    records.py                               what is kept            flat, append-only JSON lines
    score.py  report.py                      what it amounts to
    tasks.py                                 the same for people who live in Inspect
"""
