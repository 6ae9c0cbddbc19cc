"""Processes, one after another, that a killed series need not repeat."""
