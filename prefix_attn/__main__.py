"""``python -m prefix_attn``."""

from prefix_attn.cli import main

main()
