"""Which bytes a training needs on each device, without and with shards.

`arithmetic` adds them up, `kept` counts in the graph what waits for gradients.
"""
