"""`python -m hf_attn.cli`: the command line without its script."""

from hf_attn.cli import main

main()
