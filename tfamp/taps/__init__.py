"""What stands in the way of layers and gradients, and looks at what passes.

`gates` stand in the way of any method, `passing` is the way of a tensor and
its gradient, `parts` are what a model can be tapped at.
"""
