"""Is a file whole, and may this process write it?"""
