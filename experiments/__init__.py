"""One file per question, run as `python -m experiments NAME`.

Files whose names begin with an underscore are helpers.
"""
