"""How good is a model? Scores as lm-evaluation-harness counts them, and calibration."""
