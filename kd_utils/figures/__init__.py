"""How does it look? Functions from tidy tables to charts."""
