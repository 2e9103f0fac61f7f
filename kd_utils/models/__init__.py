"""A causal language model: how it is loaded, made and run for its signals."""
