"""What float16 would lose: a few steps measured in float32.

`measure` is the door, `advice` what follows, `report` what is kept of it.
"""
