"""`python -m plures` is `plures`."""

from plures.cli.app import main

main()
