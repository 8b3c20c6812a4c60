"""Letting a prefix into a frozen transformers model: which modules, where tokens stand, what runs."""
