"""The compiled part of reading rows in binary form: PostgreSQL's rows -> Arrow's columnar format.

One kernel serves every query: a matrix of numbers, the plan, tells it for each column what its
values are and where they go. It never calls Python and holds no lock of Python's, so that shards
are received and decoded side by side. Numba keeps the machine code on disk: only the first process
that reads from PostgreSQL ever compiles it, which takes some seconds.
"""
