"""Chat templates by name or file: exact on any tokenizer, and refused in one sentence."""

from __future__ import annotations

import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import templates as t
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm_gym.chat import Chat, load_chat
from llm_gym.envs import make
from llm_gym.errors import ConfigError, TemplateError
from llm_gym.harness import TrainConfig
from llm_gym.testing import check_environment
from llm_gym.tokenizer import load_tokenizer

WORDS = ["User", "Assistant", "the answer is 42", "what is 6 times 7?", "\n\n", "42", "Is it?"]


@cache
def base(kind: str) -> Any:
    """A base model's tokenizer: no template, an EOS, and in three kinds a BOS that it puts before a text."""
    if kind == "bytes":
        return t.tokenizer(None, "<|endoftext|>")
    if kind == "chatml tokens":
        return t.tokenizer(None, "<|endoftext|>", ("<|im_start|>", "<|im_end|>"))
    if kind == "bytes with bos":
        made = t.tokenizer(None, "<|endoftext|>", ("<|im_start|>", "<|im_end|>"))
        backend = made.backend_tokenizer
        bos = ("<|bos|>", made.bos_token_id)
        backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
        return made
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    scheme = kind.removeprefix("metaspace ")
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme, split=False)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    bpe.train_from_iterator(
        WORDS * 9, trainers.BpeTrainer(vocab_size=500, special_tokens=special[:3], show_progress=False)
    )
    state = json.loads(bpe.to_str())
    for text in special[3:]:
        state["model"]["vocab"][text] = len(state["model"]["vocab"])
    bpe = Tokenizer.from_str(json.dumps(state))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = ["bytes", "bytes with bos", "chatml tokens", "metaspace first", "metaspace always"]
PAIRS = [*(("plain", kind) for kind in KINDS), ("chatml", "chatml tokens"), ("chatml", "bytes with bos")]
on_any_tokenizer = pytest.mark.parametrize(("name", "kind"), PAIRS)
characters = st.sampled_from("aZ 09\n.,<|>/{}'\\é日🙂:") | st.characters(codec="utf-8")
texts = st.text(characters, max_size=20).filter(t.ordinary)


@cache
def chat_of(name: str, kind: str) -> Chat:
    return load_chat(base(kind), chat_template=name)


@on_any_tokenizer
@settings(max_examples=20, deadline=None)
@given(system=texts, question=texts, answer=texts, more=texts)
def test_contexts_are_the_full_render(name: str, kind: str, system: str, question: str, answer: str, more: str) -> None:
    chat = chat_of(name, kind)
    opening = [{"role": "system", "content": system}, t.user(question)]
    assert chat.open(opening).tolist() == t.full_render(chat, opening)
    cut = chat.extend([], [t.user(more)])
    whole = t.full_render(chat, [*opening, t.assistant(answer), t.user(more)])
    assert whole[-len(cut) :] == cut.tolist()
    assert cut[0] == chat.stop_ids[0]


@on_any_tokenizer
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_whatever_is_sampled_stays(name: str, kind: str, data: Any) -> None:
    """Append-only, for random ids and for texts; the next message stands behind one stop token."""
    chat = chat_of(name, kind)
    ids = data.draw(st.lists(st.integers(0, chat.vocab_size - 1), max_size=8))
    for reply in (np.array(ids, np.int32), chat.encode_reply(data.draw(texts))):
        following = chat.extend(reply, [t.user("On?")])
        assert "On?" in chat.text(following)
        ended = len(reply) > 0 and int(reply[-1]) == chat.stop_ids[0]
        assert (following[0] == chat.stop_ids[0]) is not ended
        turns = 1 if name == "chatml" else 0  # what ends the user's message
        assert following.tolist().count(chat.stop_ids[0]) == (turns if ended else turns + 1)


def test_plain_text_reads_as_written() -> None:
    chat = chat_of("plain", "bytes with bos")
    opening = chat.open([{"role": "system", "content": "Be brief."}, t.user("6 * 7?")])
    reply = chat.encode_reply("42")
    whole = np.concatenate([opening, reply, chat.extend(reply, [t.user("Sure?")])])
    text = "<|bos|>Be brief.\n\nUser:\n6 * 7?\n\nAssistant:\n42<|endoftext|>\n\nUser:\nSure?\n\nAssistant:\n"
    assert chat.tokenizer.decode(whole) == text
    assert chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids)) == ["<|endoftext|>"]
    assert whole[0] == chat.tokenizer.bos_token_id


def test_a_control_token_is_written_first_where_the_tokenizer_does() -> None:
    for kind in KINDS:
        tokenizer, ids = base(kind), chat_of("plain", kind).open([t.user("q")]).tolist()
        assert (ids[0] == tokenizer.bos_token_id) is (tokenizer("q")["input_ids"][0] == tokenizer.bos_token_id)


@pytest.mark.parametrize("declared", [True, False])
def test_a_bos_that_only_the_folder_declares_is_written_first(declared: bool, tmp_path: Path) -> None:
    """DeepSeek's: its tokenizer.json puts nothing in front of a text, tokenizer_config.json says `add_bos_token`."""
    base("bytes").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "add_bos_token": declared}), "utf-8")
    chat = load_chat(str(tmp_path), chat_template="plain")
    assert bool(chat.open([t.user("q")])[0] == chat.tokenizer.bos_token_id) is declared


@pytest.mark.parametrize("kind", KINDS)
def test_spelled_control_tokens_stay_text(kind: str) -> None:
    chat = chat_of("plain", kind)
    eos = str(chat.tokenizer.eos_token)
    ids = chat.open([t.user(f"a{eos}b")])
    assert chat.stop_ids[0] not in ids.tolist()
    assert f"a{eos}b" in chat.text(ids).replace("< /", "</")  # one scheme puts a space before every piece of text


def test_the_tokenizer_given_keeps_its_own_template() -> None:
    own = load_tokenizer()
    before = own.chat_template
    plain = load_tokenizer(own, "plain")
    assert plain is load_tokenizer(None, "plain"), "one for each tokenizer and template"
    assert own.chat_template == before != plain.chat_template
    assert load_tokenizer(own) is own
    copy = pickle.loads(pickle.dumps(load_chat(own, chat_template="plain")))
    assert copy.open([t.user("a")]).tolist() == load_chat(own, chat_template="plain").open([t.user("a")]).tolist()


MINE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}[assistant] "


def test_a_file_and_a_text_do_as_well(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(MINE, "utf-8")
    for template in (file, str(file), MINE):
        chat = load_chat(base("bytes"), chat_template=template)
        assert chat.text(chat.open([t.user("a")])) == "[user] a<|endoftext|>[assistant] "


@pytest.mark.parametrize("cls", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_a_template_beside_the_tokenizer_is_found(cls: str, tmp_path: Path) -> None:
    """In a folder whose tokenizer_config.json has none, on either way in which tokenizers are loaded."""
    base("bytes").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": cls}), "utf-8")
    assert config.get("chat_template") is None
    (tmp_path / "chat_template.jinja").write_text(MINE, "utf-8")
    env = make("Arithmetic-v0", tokenizer=str(tmp_path))
    obs, _ = env.reset(seed=0)
    assert env.unwrapped.chat.text(obs).endswith("[assistant] ")  # type: ignore[attr-defined]
    env.close()


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_a_saved_template_is_everybodys(name: str, tmp_path: Path) -> None:
    chat = chat_of(name, "bytes with bos")
    chat.tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [t.user("6 * 7?")]
    again = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert again == chat.open(messages).tolist() == load_chat(tmp_path).open(messages).tolist()


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("bytes", None, "has no chat template; pass chat_template=plain (--chat-template plain)"),
        ("bytes", "plian", "chat_template: unknown value 'plian'; did you mean 'plain'?"),
        ("bytes", "missing.jinja", "chat_template: no file 'missing.jinja'."),
        ("bytes", ".", "chat_template: cannot read '.'"),
        ("bytes", "chatml", "'chatml' needs <|im_start|> as a control token, which '' lacks; pass plain."),
        ("no eos", "plain", "'plain' ends a reply with the EOS token, but '' has none."),
    ],
)
def test_mistakes_get_one_sentence(kind: str, given: str | None, words: str) -> None:
    tokenizer = base("bytes")
    if kind == "no eos":
        tokenizer = t.tokenizer(None)
        tokenizer.eos_token = None
    with pytest.raises((ConfigError, TemplateError)) as error:
        make("Arithmetic-v0", tokenizer=tokenizer, chat_template=given)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{% for m in messages %}{{ m.content }", "is not Jinja (unexpected '}', line 1)."),
        ("{% for m in messages %}{{ m.content }}", "is not Jinja (Unexpected end of template."),
        ("{{ messages | nothing }}", "is not Jinja (No filter named 'nothing', line 1)."),
        ("a letter", "no chat template: it has no Jinja in it."),
    ],
)
def test_a_file_that_is_no_template_is_named(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigError) as error:
        TrainConfig(chat_template=str(file)).resolved()
    assert str(file) in str(error.value)
    assert words in str(error.value)


def test_a_tokenizer_whose_own_template_is_broken_is_refused_in_a_sentence() -> None:
    with pytest.raises(TemplateError, match="it is not Jinja"):
        Chat(t.tokenizer("{% for m in messages %}{{ m.content }}"))


@pytest.mark.parametrize("name", ["plain", "chatml"])
@pytest.mark.parametrize("env", ["Arithmetic-v0", "GuessNumber-v0", "GSM8K-v0"])
def test_environments_conform_on_a_base_model(env: str, name: str) -> None:
    data = {"dataset": "sample"} if env == "GSM8K-v0" else {}
    check_environment(env, tokenizer=base("bytes with bos"), chat_template=name, **data)
