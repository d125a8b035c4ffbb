"""`x1 runs`: every run, here and mirrored; the trash, and the way out of it.

command: the words; listing: the table; removal, emptying: into the trash, out of it, and for good.
"""
