"""What is in `artifacts/`, who needs it, and what can go?"""
