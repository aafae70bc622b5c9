"""Labelled images, for the tasks that classify them: read from any source, and split.

`sources` knows what lies where, `lists` and `records` read text lists and tables, `splits` and `few_shot` decide what
is trained and what is tested on. Nothing here decodes an image.
"""
