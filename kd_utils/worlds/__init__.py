"""Does a finding hold in other worlds: with other teachers, initial students, rows?"""
