"""Which machines are there, and do they see the same files?"""
