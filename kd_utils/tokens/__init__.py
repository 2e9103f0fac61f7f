"""How does text become token ids, and how do two tokenizations of one text line up?"""
