"""What in a model will go wrong in 16 bits, found before it trains.

`check` is the door, `trace`, `step`, `scratch`, `graph` and `ops` see the
graph, the rules stand one topic a module.
"""
