"""What a model can do: tasks of lm-evaluation-harness, and this package's own, with its own batching and limits.

evaluate.py     public: a model's scores, and how they differ from another model's
records.py      what these return
catalogue.py    what a task's name means
local_data.py   the questions, from files that are here
harness.py      a model as the harness asks one
likelihoods.py  what it answers where no text is written
drafted.py      answers that a model's own cuts draft
kept.py         responses in a file, so that a killed run goes on
code_runs.py    code that a model wrote, run with limits
definitions/    the package's own tasks, as the harness describes tasks
"""
