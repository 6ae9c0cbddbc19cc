"""Exports of a recipe's model, with the metric of each.

The statistics are parity's, over pieces of the data instead of seeds.
"""
