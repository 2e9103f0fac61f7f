"""How is a smaller model of the same kind cut out of a larger one?"""
