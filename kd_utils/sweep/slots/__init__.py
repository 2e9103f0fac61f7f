"""Processes that run trials one after another: what a trial needs is imported once."""
