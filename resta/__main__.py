"""`python -m resta` is the `resta` command."""

from resta.cli import main

main()
