"""How is a student made of another model, before it is trained?"""
