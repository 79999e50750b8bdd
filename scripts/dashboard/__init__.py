"""A web page about the runs of a directory: `python -m scripts.dashboard --runs_dir runs`.

The trainer knows nothing of it. The server reads what runs have written and writes their control.json; if it is killed,
training does not notice, and a run that it has started goes on.
"""
