"""White-box distillation of causal language models: signals, cache, losses and the sweep over
them.
"""

import warnings

# Libraries ask for notebook widgets that a record could not show anyway; plain progress bars are
# what we want.
warnings.filterwarnings("ignore", message="IProgress not found")
