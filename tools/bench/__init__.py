"""Side-by-side measurements of checkpoint libraries on this machine, with the machine's own floors in the same run.

`python -m tools.bench` prints a table, writes a JSON record to `results/` and draws a chart. A benchmark, never a test.
"""
