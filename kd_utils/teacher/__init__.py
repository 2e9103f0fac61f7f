"""Who makes the signals? The teacher, fine-tuned or not, run over every example on its devices."""
