"""A decoder: SmolLM2-135M, LoRA fine-tunes on tasks judged by the likelihood of choices, merged as adapters and dense.

The published weights are quantised to 4 bits; the base is what they dequantise to.
"""
