"""A run that goes on: what is saved, where, and how it comes back."""
