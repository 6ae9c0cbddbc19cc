"""Policies, and what stays in float32 under them."""
