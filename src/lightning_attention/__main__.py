"""`python -m lightning_attention`: the command line."""

from .cli import main

main()
