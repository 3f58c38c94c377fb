"""Speculative decoding: draft tokens cheaply, check them all in one pass, keep what the model would have written."""
