"""`fit` and `evaluate`: epochs, graph calls, data, callbacks, progress."""
