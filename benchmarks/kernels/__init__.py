"""Tools for the kernels themselves: tiles, compiled resources, instructions, bytes, the roofline; and gpu.sh."""
