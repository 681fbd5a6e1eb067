"""`python -m varaccel`."""

from varaccel.cli.commands import main

if __name__ == "__main__":
    main()
