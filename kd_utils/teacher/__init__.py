"""Who makes the signals? The teacher is fine-tuned, run over every example, on one device or
many.
"""
