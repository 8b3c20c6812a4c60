"""Attach prefixes to the attention of a frozen transformers model."""
