"""Which parameters are there, and which values may they have?"""
