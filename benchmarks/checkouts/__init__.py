"""Two checkouts of tfamp beside each other: see `__main__`."""
