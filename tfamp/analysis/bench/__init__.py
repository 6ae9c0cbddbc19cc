"""How fast, and in how much memory, beside float32.

`series` makes the runs, `record` and `figures` say what they come to.
"""
