"""Reading of models: checkpoints, adapters, rules for their tensors, matrices, task vectors and moments.

``checkpoint`` is the interface that all sources share and ``loading`` opens one, from ``weight_files`` (with
``archive``), memory, or as an adapter (``lora``, ``lora_names``). ``rules`` decides for every tensor whether it is
merged, and ``views`` has the matrices of one that is; ``task_vectors`` reads the experts' updates of them, once
``fitting`` has found that the experts fit the base. ``moments`` has moments of the experts' data for each matrix, which
``collecting`` makes of a model and its data, with ``module_inputs``.
"""
