"""What do the trials show? Tables, tests and verdicts."""
