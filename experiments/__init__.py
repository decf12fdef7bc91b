"""One file per question, run as `python -m experiments NAME`; files whose names begin with an underscore are helpers."""
