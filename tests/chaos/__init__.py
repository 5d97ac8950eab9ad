"""Break runs, files and inputs on purpose, and count what survives.

`python -m tests.chaos` (`make chaos`) kills runs at random moments, damages every file of a run
folder and of its tokens, and generates configurations, documents, models and tokenizers that nobody
would write. It prints and writes a table: how often each was tried, and how often it survived.
`test_chaos.py` does the same with small counts. Inputs that failed once lie in `corpus` and are
tried first. `tiny_run.py` has the run that is killed and damaged, `inputs.py` what all generated
inputs share.
"""
