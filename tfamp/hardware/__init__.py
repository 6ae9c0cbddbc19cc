"""What this machine is: its devices, the precision that suits them, and what is
known to be broken in this combination of versions.
"""
