"""Each layer's precision by measurement.

`measure` is the door, `switch` lets one traced step compute each layer in
either precision, `gradient` runs it, `report` is what is kept.
"""
