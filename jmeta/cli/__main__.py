"""`python -m jmeta.cli`."""

from jmeta.cli import main

main()
