"""Replicas and workers: strategies and their data, what workers agree on, and
the processes of a job, from start to end.
"""
