"""The language suite: MiniLM fine-tuned on six tasks of text, on a CPU in minutes.

``python -m benchmarks.language.train`` makes base, heads and experts once, in the user's cache; the harness merges and
judges them.
"""
