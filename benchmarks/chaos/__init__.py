"""Runs that are disturbed at random, and end as if they had not been."""
