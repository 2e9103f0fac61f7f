"""Experiments that need no model hub: the toy benchmark and SmolLM2."""
