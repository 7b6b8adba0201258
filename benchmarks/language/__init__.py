"""A small language suite: MiniLM fine-tuned on the sentiment of four kinds of text, on a CPU in minutes.

``python -m benchmarks.language.train`` makes base and experts once, in the user's cache; `benchmarks.tails_suites` asks
what tails the residuals of their merges have.
"""
