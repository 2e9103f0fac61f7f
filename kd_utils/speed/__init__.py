"""How fast is each part, and how far is it from its limit? Notebook 05 measures with this room."""
