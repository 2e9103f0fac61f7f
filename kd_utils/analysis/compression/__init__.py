"""What is left of a teacher in smaller students, by how much smaller they are?"""
