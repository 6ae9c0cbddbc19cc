"""The loss scale: how it moves, how gradients are reduced, judged and
unscaled, and the optimizer that does all of it in one step.
"""
