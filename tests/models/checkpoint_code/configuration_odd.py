"""A config class as checkpoints bring them: words of its own, and defaults that config.json does not repeat."""

from transformers import PretrainedConfig


class OddConfig(PretrainedConfig):
    model_type = "odd_from_a_folder"
    attribute_map = {"hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "heads"}

    def __init__(
        self, vocab_size=96, width=32, depth=2, heads=4, kv_heads=2, span=256, tie_word_embeddings=False, **others
    ):
        self.vocab_size = vocab_size
        self.width = width
        self.depth = depth
        self.heads = heads
        self.kv_heads = kv_heads
        self.span = span
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)

    @property
    def num_key_value_heads(self):
        return self.kv_heads

    @property
    def max_position_embeddings(self):
        return self.span
