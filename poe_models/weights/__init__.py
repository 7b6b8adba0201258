"""Reading models: checkpoints, adapters, rules for their tensors, matrices, task vectors and moments."""
