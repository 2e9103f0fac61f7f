"""Which rows are trained and evaluated on?"""
