"""Supervised fine-tuning: make the models that the equation adds and subtracts.

`recipe -> data -> chat -> train -> output`, in that order and each in its own file. Nothing here knows how
models are merged or judged; it meets those parts only at the directories it writes.
"""
