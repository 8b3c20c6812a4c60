"""Prefixes on Hugging Face models. The only package, with ``train`` and ``evaluate``, that imports transformers."""
