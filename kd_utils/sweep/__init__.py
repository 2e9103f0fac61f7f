"""What is still to run, and who runs it?"""
