"""`python -m holoslide`: the command line where its script is not installed."""

from holoslide.cli import main

if __name__ == "__main__":
    main()
