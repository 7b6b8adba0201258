"""The vision suite: SqueezeNet fine-tuned on four small tasks, then merged.

Everything comes from package registries (`sources`), becomes disjoint splits (`tasks`), a base and four experts
(`model`, `train`) and logits on held-out examples (`evaluate`, `metrics`). `demo` merges the experts and prints the
comparison.
"""
