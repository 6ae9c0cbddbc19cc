"""`python -m tfamp.launch`: the processes of one job on this machine."""

from tfamp.distribute.launch import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
