"""A tokenizer as some checkpoints bring it: Python around a tiktoken.Encoding, its expression nowhere else."""

import base64
import os

import tiktoken
from transformers import PreTrainedTokenizer

CUT = r"[A-Za-z]{1,4}|\p{N}{1,2}|\s+|[^\s]"
SPECIAL = ("<odd:start>", "<odd:end>")


class OddTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "odd.ranks"}

    def __init__(self, vocab_file, bos_token="<odd:start>", eos_token="<odd:end>", **options):
        with open(vocab_file, "rb") as file:
            ranks = {base64.b64decode(word): int(rank) for word, rank in map(bytes.split, file)}
        special = {token: len(ranks) + index for index, token in enumerate(SPECIAL)}
        self.encoding = tiktoken.Encoding("odd", pat_str=CUT, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_file = vocab_file
        self.names = {token.decode("latin-1"): rank for token, rank in ranks.items()} | special
        self.tokens = {rank: name for name, rank in self.names.items()}
        super().__init__(bos_token=bos_token, eos_token=eos_token, **options)

    @property
    def vocab_size(self):
        return self.encoding.n_vocab

    def get_vocab(self):
        return dict(self.names)

    def _tokenize(self, text, **_):
        return [self.tokens[index] for index in self.encoding.encode(text, allowed_special="all")]

    def _convert_token_to_id(self, token):
        return self.names[token]

    def _convert_id_to_token(self, index):
        return self.tokens[index]

    def encode(self, text, add_special_tokens=True, **_):
        before = [self.bos_token_id] if add_special_tokens else []
        return before + self.encoding.encode(text, allowed_special="all")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return (os.path.join(save_directory, "odd.ranks"),)
