"""A tokenizer as some checkpoints bring it: Python around sentencepiece, with tokens that only the code knows."""

import sentencepiece
from transformers import PreTrainedTokenizer

MARKS = ("[gMASK]", "<sop>")


class PieceTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "pieces.model"}

    def __init__(self, vocab_file, **options):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self.vocab_file = vocab_file
        options.setdefault("eos_token", "</s>")
        options.setdefault("unk_token", "<unk>")
        super().__init__(**options)
        self.add_special_tokens({"additional_special_tokens": list(MARKS)})

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return {self.pieces.id_to_piece(index): index for index in range(len(self.pieces))} | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return self.pieces.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.pieces.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.pieces.id_to_piece(index)

    def build_inputs_with_special_tokens(self, first, second=None):
        return [*self.convert_tokens_to_ids(list(MARKS)), *first, *(second or ())]

    def get_special_tokens_mask(self, *_, **__):
        return []

    def create_token_type_ids_from_sequences(self, first, second=None):
        return [0] * (len(MARKS) + len(first) + len(second or ()))
