"""Small models beside the papers' claims: text, claims with their rules, jobs, tables and plots.

`registry.py` lists the claims. A claim names the readings (`jobs.py`) that it needs and has a rule
(`rules.py`), a pure function of what was measured. `lcdist.commands.claims` runs the jobs.
"""
