"""Sets of questions on disk: our own format, VQA-Constraints, and the annotation of questions that have no constraints.

All but `loading` needs neither torch nor Pillow: a client's machine checks and converts files with it.
"""
