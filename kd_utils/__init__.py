"""White-box distillation of causal language models: signals, cache, losses and the sweep over them."""
