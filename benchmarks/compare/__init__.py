"""tfamp beside stock Keras and PyTorch: see `benchmarks.compare.__main__`.

    python -m benchmarks.compare

A process of a contestant imports this too: nothing of a framework is here.
"""
