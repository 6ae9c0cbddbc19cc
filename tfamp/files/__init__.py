"""What tfamp writes and prints: output folders and files that are never half
there, JSON lines, the terminal.
"""
