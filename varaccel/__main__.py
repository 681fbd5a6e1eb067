"""`python -m varaccel`."""

from varaccel.cli import main

if __name__ == "__main__":
    main()
