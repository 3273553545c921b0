"""A word-level tokenizer in Hugging Face format, with a chat template of Qwen3's shape."""

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, START, STOP, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"
SPECIAL = (PAD, START, STOP, UNKNOWN)
THINK = ("<think>", "</think>")
PIECE = r"\n\n|\n|[a-z]+|[0-9]|[^\sa-z0-9]"
"""A token: a blank line, a line end, a word, a digit or a sign."""

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and not loop.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def words(text: str) -> list[str]:
    """The tokens of a text without special tokens, as strings.

    >>> words("add 12 + 5.\\n\\nsure")
    ['add', '1', '2', '+', '5', '.', '\\n\\n', 'sure']
    """
    return re.findall(PIECE, text)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer whose vocabulary is every word of the texts, in alphabetical order after the special tokens.

    Text is lower-cased; other words become <unk>. Decoding restores the usual spaces, so that text -> ids -> text is the identity on
    the world's own texts.
    """
    for token in (*SPECIAL, *THINK):
        texts = [text.replace(token, " ") for text in texts]
    known = sorted({word for text in texts for word in words(text)} | {"\n", "\n\n", *"0123456789", "system", "user", "assistant"})
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *THINK, *known))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "removed", invert=True)
    no_space = r" (?=[.,;:?!\n])|(?<=\n) |(?<=[0-9]) (?=[0-9])"
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), decoders.Replace(Regex(no_space), "")]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINK])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=STOP,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
