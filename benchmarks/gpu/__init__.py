"""One command that proves and measures everything on a GPU within a budget: `python -m benchmarks.gpu --budget 470`.

case          what is to be done, and what became of it
catalogue     every case, the most important first
journal       one line on disk for each result, at once
pool          processes that carry cases out; a crash costs one case
correctness   engines against their definition in float64
hazards       what only a GPU shows: races, odd sizes, large offsets, synchronisation, compiled graphs
speed         engines beside those of others
training      steps of whole models, and one run through `train.py`
tuning        neighbours of the launch tables' rows
summary       verdicts, ratios and tables
"""
