"""Whether 16 bits reach what float32 reaches, with statistics.

`series` makes the runs, `record` judges them.
"""
