"""How the cost of a step grows: see `benchmarks.scaling.__main__`.

python -m benchmarks.scaling
"""
