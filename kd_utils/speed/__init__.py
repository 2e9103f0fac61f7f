"""How fast is each part, beside its limit?"""
