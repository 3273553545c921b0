"""Small tokenizers with chat templates of the three shapes that models in use have, and two that misbehave."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from opsa_jax.data.chat import Chat

# System message, enable_thinking, think blocks kept for the last answer only.
QWEN3 = """
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set parts = m.content.split('</think>') %}
{%- set thought = parts[0].split('<think>')[-1].strip() if parts|length > 1 else '' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
{{- parts[-1].strip() + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
# Headers around roles, trimmed contents, a beginning-of-text token.
LLAMA3 = """
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
# The system message stands before the first turn, and the assistant opening opens a think block.
R1 = """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}{%- endif %}
{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}{%- endif %}
{%- if m.role == 'assistant' %}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""
REJECTS_SYSTEM = "{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{%- endif %}" + LLAMA3
DROPS_SYSTEM = LLAMA3.replace("{%- for m in messages %}", "{%- for m in messages if m.role != 'system' %}")

SPECIALS = {
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "r1": ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"],
}
TEMPLATES = {"qwen3": QWEN3, "llama3": LLAMA3, "r1": R1}
# eos, bos, pad of each; Llama-3 names no pad, as the real one.
ENDS = {
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3": {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>"},
    "r1": {"eos_token": "<|end|>", "bos_token": "<|begin|>"},
}
TEXT = ["How do I open the old vault in the tower?", "The user asks for help, and I can not help with this.", "system user assistant\n\n"]


def save(folder: Path, kind: str, template: str | None = None) -> Path:
    """A byte-level BPE tokenizer of that kind, written as a checkpoint folder."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS[kind], initial_alphabet=alphabet, show_progress=False)
    )
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    if "bos_token" in ENDS[kind]:  # as the real ones: a bare text gets one, and a rendered chat must not get a second
        bos = ENDS[kind]["bos_token"]
        tok.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tok.token_to_id(bos))])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=template or TEMPLATES[kind], **ENDS[kind])
    fast.save_pretrained(folder)
    return folder


def load(folder: Path, kind: str, template: str | None = None, thinking: str = "auto") -> Chat:
    return Chat.load(str(save(folder, kind, template)), thinking=thinking)
