"""The commands of `tfamp`, one module each.

A module has `add_to(commands)`, which declares its arguments, and `_run(args)`,
which returns the exit status. It imports what is heavy only where it runs.
"""
