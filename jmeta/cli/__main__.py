"""`python -m jmeta.cli`."""

from jmeta.cli import main

if __name__ == "__main__":
    main()
