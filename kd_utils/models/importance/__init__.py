"""How much does each unit of a model matter, and which ones does a cut keep?"""
