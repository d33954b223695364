"""What a model on disk says about itself: where it is, its config, its tokenizer, its GGUF header. Knows no torch.

Everything read here was written by someone else and is treated so: sizes are checked before they are used, nothing is
unpickled, and no code from a model folder is ever imported. Tensors become weights in ``octavo.loader``.
"""
