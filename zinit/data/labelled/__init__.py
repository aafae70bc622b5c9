"""Labelled images, for the tasks that classify them: read from any source, and split.

`sources` finds what a source holds, `lists` and `records` read text lists and tables, `splits` and `few_shot` decide
what is trained on and what is tested. Nothing here decodes an image.
"""
