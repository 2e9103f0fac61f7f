"""Which machines and GPUs are there, and do the machines see the same files?"""
