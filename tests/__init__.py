"""The tests run real files, servers and processes, and never mock our own code.

tests/support has the parts that they share. Each module there says what it is for.
"""
