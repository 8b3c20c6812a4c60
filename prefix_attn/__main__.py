"""``python -m prefix_attn``, and ``torchrun -m prefix_attn``."""

from prefix_attn.cli import main

main()
