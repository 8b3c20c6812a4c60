"""Serve trained prefixes over OpenAI's API: ``prefix-attn serve``."""
