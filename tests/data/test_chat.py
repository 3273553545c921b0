import dataclasses
import json

import numpy as np
import pytest
import tiny_chat
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opsa_jax.data.chat import Chat, left_pad
from opsa_jax.errors import UserError

KINDS = list(tiny_chat.TEMPLATES)
CONTEXT = "Only refuse.\n- never comply; <think> is a word here"
PROMPT = "  How do I open the café's vault?\n\nTell me <|im_end|> now "


def error(call) -> str:
    with pytest.raises(UserError) as e:
        call()
    assert "\n" not in str(e.value)
    return str(e.value)


def reference(folder, messages, **options) -> list[int]:
    """What transformers itself makes of a conversation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_tokenizer_itself(tmp_path, kind):
    chat = tiny_chat.load(tmp_path, kind)
    assert chat.splitter is not None  # the short cut is on, so it is what is compared
    user = {"role": "user", "content": PROMPT}
    cases = [
        ((PROMPT,), [user]),
        ((PROMPT, CONTEXT), [{"role": "system", "content": CONTEXT}, user]),
        ((PROMPT, CONTEXT, "user"), [{"role": "user", "content": f"{CONTEXT}\n\n{PROMPT}"}]),
        ((PROMPT, "", "system", "Be brief."), [{"role": "system", "content": "Be brief."}, user]),
        ((PROMPT, CONTEXT, "system", "Be brief."), [{"role": "system", "content": f"{CONTEXT}\n\nBe brief."}, user]),
        (
            (PROMPT, CONTEXT, "user", "Be brief."),
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{CONTEXT}\n\n{PROMPT}"}],
        ),
    ]
    for arguments, messages in cases:
        assert chat.encode(*arguments) == reference(tmp_path, messages), arguments
    rows = chat.encode_texts([chat.render(*arguments) for arguments, _ in cases])
    assert [r.tolist() for r in rows] == [reference(tmp_path, m) for _, m in cases] and rows[0].dtype == np.int32


def test_special_tokens_hidden_in_any_text_are_cut_as_the_tokenizer_does(tmp_path):
    chat = tiny_chat.load(tmp_path, "qwen3")
    rng = np.random.default_rng(0)
    pieces = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", " ", "\n", "é", "ab", "<|im_", "end|>", "1", "用"]
    texts = ["".join(rng.choice(pieces, 20)) for _ in range(200)]
    assert [r.tolist() for r in chat.encode_texts(texts)] == chat.tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_the_longest_special_token_wins(tmp_path):
    chat = tiny_chat.load(tmp_path, "qwen3")
    chat.tokenizer.add_tokens(["<|im_end|><|im_start|>"], special_tokens=True)
    chat = dataclasses.replace(chat, splitter=chat._safe_splitter())
    text = "a<|im_end|><|im_start|>b<|im_end|>c"
    assert chat.encode_texts([text])[0].tolist() == chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat.splitter.split(text) == ["a", "<|im_end|><|im_start|>", "b", "<|im_end|>", "c"]


def test_tokenizers_that_look_across_pieces_are_not_cut(tmp_path):
    tok = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "▁What": 2, "What": 3, "[U]": 4, "<unk>": 5}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok.add_special_tokens(["<s>", "</s>", "[U]"])
    template = "[U]{{ messages[0].content }}{% if messages|length > 1 %}{{ messages[1].content }}</s>{% endif %}"
    PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=template, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    chat = Chat.load(str(tmp_path))
    assert chat.splitter is None
    assert chat.encode("What") == reference(tmp_path, [{"role": "user", "content": "What"}]) == [4, 3]  # not 2: it is not first


def test_thinking_switch_of_the_template(tmp_path):
    rendered = {t: tiny_chat.load(tmp_path, "qwen3", thinking=t) for t in ("auto", "on", "off")}
    assert rendered["auto"].render("Hi") == rendered["on"].render("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered["off"].render("Hi") == rendered["on"].render("Hi") + "<think>\n\n</think>\n\n"
    assert rendered["off"].encode("Hi") == reference(tmp_path, [{"role": "user", "content": "Hi"}], enable_thinking=False)
    assert not any(c.ignores_switch for c in rendered.values())


def test_thinking_off_closes_a_block_the_template_opens(tmp_path):
    auto, on, off = (tiny_chat.load(tmp_path, "r1", thinking=t) for t in ("auto", "on", "off"))
    assert auto.render("Hi") == on.render("Hi") == "<|begin|><|User|>Hi<|Assistant|><think>\n"
    assert off.render("Hi") == "<|begin|><|User|>Hi<|Assistant|><think>\n\n</think>\n\n"
    assert off.ignores_switch and off.closes_think and on.ignores_switch and not on.closes_think
    assert off.opening() == "<|Assistant|><think>\n\n</think>\n\n"
    llama = tiny_chat.load(tmp_path, "llama3", thinking="off")  # no think block to close
    assert llama.ignores_switch and not llama.closes_think and llama.render("Hi").endswith("assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize(
    ("template", "verb"),
    [(tiny_chat.REJECTS_SYSTEM, "rejects system messages (no system role)"), (tiny_chat.DROPS_SYSTEM, "drops system messages")],
)
def test_templates_without_system_messages(tmp_path, template, verb):
    chat = tiny_chat.load(tmp_path, "llama3", template)
    message = error(lambda: chat.render("Hi", "Refuse."))
    assert verb in message and "--teacher.placement user" in message
    assert "Refuse.\n\nHi" in chat.render("Hi", "Refuse.", "user") and "Hi" in chat.render("Hi")


@pytest.mark.parametrize(
    ("kind", "stops", "pad"),
    [
        ("qwen3", ["<|im_end|>"], "<|endoftext|>"),
        ("llama3", ["<|end_of_text|>", "<|eot_id|>"], "<|end_of_text|>"),
        ("r1", ["<|end|>"], "<|end|>"),
    ],
)
def test_stop_ids_are_eos_and_end_of_turn(tmp_path, kind, stops, pad):
    chat = tiny_chat.load(tmp_path, kind)
    assert chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids)) == stops
    assert chat.tokenizer.convert_ids_to_tokens(chat.pad_id) == pad


@pytest.mark.parametrize(("eos", "more"), [([2, 0], [0]), (0, [0]), (None, [])])
def test_stop_ids_of_the_generation_config(tmp_path, eos, more):
    tiny_chat.save(tmp_path, "qwen3")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert Chat.load(str(tmp_path)).stop_ids == (2, *more)


def test_decoding(tmp_path):
    chat = tiny_chat.load(tmp_path, "qwen3")
    text = "<think>\nNo .\n</think>\n\nI can't , café!"
    ids = chat.encode_texts([text + "<|im_end|>"])[0]
    assert chat.decode(ids) == text + "<|im_end|>"
    assert chat.decode_response(ids) == text


def test_what_cannot_be_loaded(tmp_path):
    message = error(lambda: Chat.load("org/no-such-model"))
    assert message.startswith("no tokenizer at 'org/no-such-model' (") and "give a local folder in Hugging Face format" in message
    assert "no tokenizer at" in error(lambda: Chat.load(str(tmp_path)))
    tiny_chat.save(tmp_path, "qwen3")
    (tmp_path / "chat_template.jinja").unlink()
    assert "has no chat template; use an instruction-tuned checkpoint" in error(lambda: Chat.load(str(tmp_path)))
    for thinking in ("auto", "on"):
        message = error(lambda t=thinking: tiny_chat.load(tmp_path, "qwen3", "{{ raise_exception('only two') }}", t))
        assert "cannot render a user message: only two" in message


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    tiny_chat.save(tmp_path, "qwen3")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    try:
        Chat.load(str(tmp_path))
    except UserError as e:
        assert "no tokenizer at" in str(e)
    assert not (tmp_path / "ran").exists()


def test_left_pad():
    ids, mask = left_pad([[5, 6, 7], [8], []], 4, pad_id=9)
    assert ids.tolist() == [[9, 5, 6, 7], [9, 9, 9, 8], [9, 9, 9, 9]] and ids.dtype == np.int32
    assert mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]] and mask.dtype == np.int32
    with pytest.raises(ValueError, match="row 1 has 5 ids, more than the 4 columns"):
        left_pad([[1], [1] * 5], 4, 0)
