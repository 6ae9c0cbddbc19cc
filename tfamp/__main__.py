"""`python -m tfamp`: the command line, where no script was installed."""

from tfamp.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
