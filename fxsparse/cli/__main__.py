"""`python -m fxsparse.cli`: the command line of an interpreter without the installed script."""

from __future__ import annotations

from fxsparse.cli.app import main

if __name__ == "__main__":
    main()
