"""`python -m gptnorm` is the command `gptnorm`."""

from gptnorm.cli import main

main()
