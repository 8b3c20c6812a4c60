"""``python -m prefix_attn.cli``."""

from prefix_attn.cli import main

main()
