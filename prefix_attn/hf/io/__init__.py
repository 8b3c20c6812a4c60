"""Prefixes on disk: our format, PEFT's and other libraries'."""
