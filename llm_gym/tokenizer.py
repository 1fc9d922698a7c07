"""A tokenizer as `Chat` needs it: loaded once, text to ids exactly, and no control tokens out of ordinary text."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from llm_gym import embedded
from llm_gym.errors import SettingError
from llm_gym.hub import offline_if_unreachable
from llm_gym.templates import NAMED, read_template, with_template

SPLIT = "\udfff"
"""Text is encoded piecewise around it. A lone surrogate: no well-formed text contains it."""
PLAIN_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Tokenizer classes that are a tokenizer.json and nothing else."""
NEAR = 16
"""Tokens of a context that decide how a text behind them is encoded; no tokenizer looks back further."""
NEUTRAL = ("\n", "x", ".", "1")
"""What a text is encoded behind, to get the ids that it has in the middle of other text."""


def load_tokenizer(source: Any = None, chat_template: str | Path | None = None) -> Any:
    """A Hugging Face tokenizer, loaded once per process.

    Args:
        source: None for the embedded model's, a folder, a hub id, or a tokenizer object (returned as it is).
        chat_template: a template in place of its own: `plain`, `chatml`, the path of a file, or the text of one.

    Raises:
        SettingError: there is no tokenizer at that path or hub id, or no such template.
        ConfigError: the template needs tokens that the tokenizer lacks.
    """
    if source is None:
        source = embedded.PATH
    tokenizer = _load(str(source)) if isinstance(source, str | Path) else source
    template = read_template(chat_template)
    return with_template(tokenizer, template, template in NAMED and _declares_bos(tokenizer))


@lru_cache(maxsize=32)
def _load(source: str) -> Any:
    valid = "pass a folder, a hub id, a tokenizer object, or None for the embedded one."
    folder = Path(source).expanduser()
    if not folder.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise SettingError(f"tokenizer: got {source!r}, but there is no such folder; {valid}")
    name = str(folder) if folder.exists() else source
    try:
        with offline_if_unreachable(name):
            return _loader(name).from_pretrained(name)
    except Exception as error:  # many kinds: no such file, no connection, a broken file
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise SettingError(f"tokenizer: got {source!r}, which cannot be loaded ({reason}); {valid}") from error


def _loader(name: str) -> Any:
    """The class that loads a folder or hub id: the plain one wherever tokenizer.json says all there is to say.

    That file is what the model was trained with. AutoTokenizer may put the rules of the class that the folder names in
    the place of the file's (a Llama class over DeepSeek's byte-level file drops every space), and it imports torch
    (seconds). It is for folders without the file, and for those that leave the special tokens to the class's defaults.
    """
    path = _file_of(name, "tokenizer_config.json")
    config = json.loads(path.read_text("utf-8")) if path else {}
    whole = bool(config.get("eos_token")) and _file_of(name, "tokenizer.json") is not None
    if whole or config.get("tokenizer_class") in PLAIN_CLASSES:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _declares_bos(tokenizer: Any) -> bool:
    """Whether the folder says that a text begins with BOS (DeepSeek): transformers forgets it where tokenizer.json has
    a rule of its own for what surrounds a text, even if that puts nothing there."""
    path = _file_of(getattr(tokenizer, "name_or_path", ""), "tokenizer_config.json")
    return bool(tokenizer.bos_token and path and json.loads(path.read_text("utf-8")).get("add_bos_token"))


def declared_stops(tokenizer: Any) -> dict[int, str]:
    """Stop ids and their texts: those of generation_config.json beside the tokenizer, else its EOS token."""
    path = _file_of(getattr(tokenizer, "name_or_path", ""), "generation_config.json")
    ids = json.loads(path.read_text("utf-8")).get("eos_token_id") if path else None
    if ids is None:
        ids = tokenizer.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
    texts = {i: tokenizer.convert_ids_to_tokens(i) for i in ids}
    return {i: str(text) for i, text in texts.items() if text is not None}


def _file_of(name: str, file: str) -> Path | None:
    """A file of a model folder or hub id (its cached copy, else downloaded), if there is one."""
    if not name or Path(name).is_dir():
        path = Path(name) / file
        return path if name and path.exists() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file)
        if found is None:  # not known to be absent either
            found = hf_hub_download(name, file)
    except Exception:  # no such file or repository, no connection, or a name that is no hub id
        return None
    return Path(found) if isinstance(found, str) else None


def _private(backend: Any) -> Any:
    """A Rust backend with settings of its own, so that those of a caller's other calls do not leak into contexts.

    It shares the vocabulary, of which a copy takes seconds, unless the added tokens would get other ids.
    """
    made = type(backend)(backend.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(backend, part) is not None:
            setattr(made, part, getattr(backend, part))
    added = dict(sorted(backend.get_added_tokens_decoder().items()))
    for special, tokens in groupby(added.values(), key=lambda token: bool(token.special)):
        (made.add_special_tokens if special else made.add_tokens)(list(tokens))
    if repr(dict(sorted(made.get_added_tokens_decoder().items()))) != repr(added):
        made = copy.deepcopy(backend)
        made.no_padding()
        made.no_truncation()
        made.encode_special_tokens = False
    return made


class Coder:
    """Text to ids and back, on a private copy of the tokenizer's Rust backend where it has one.

    A control token is an added token flagged special. `tidy` marks those spelled out in ordinary text
    so that `encode` reads them as text: the text is split behind the token's first character and the
    pieces are encoded one by one, so that the ids still decode to the text as it was.
    """

    def __init__(self, tokenizer: Any, reserved: Sequence[str] = ()) -> None:
        """Makes its own backend; `reserved` are further texts that `tidy` must break."""
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        self.vocab_size = max(len(tokenizer), *(i + 1 for i in added), 1)
        """One more than the largest id."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._tokenizer, self._backend = tokenizer, None if backend is None else _private(backend)
        self._control_ids = frozenset(i for i, t in added.items() if t.special)
        self._neutral = [left for left in NEUTRAL if self._adds_nothing(left)]
        control = sorted((str(t.content) for t in added.values() if t.special), key=len, reverse=True)
        self._control = _any_of(control)
        self._breakable = _any_of([*reserved, *(text for text in control if len(text) > 1)])

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, control tokens read as such; pieces between `SPLIT`s are encoded one by one."""
        if SPLIT not in text:
            return self._encode(text)
        first, *rest = text.split(SPLIT)
        return [*self._encode(first), *(i for piece in rest for i in self._behind(self._neutral, piece))]

    def encode_behind(self, context: Sequence[int], text: str) -> list[int]:
        """Ids of `text`, control tokens read as such, as it stands behind `context`: without the space that many
        tokenizers put in front of what they encode by itself.

        Where encoding both together would merge tokens across the border, `text` is encoded as in the middle of a
        text that it does not merge with, for the context is fixed: only such ids can be sampled behind it.
        """
        near = list(context[-NEAR:])
        start = max((i for i, token in enumerate(near) if token in self._control_ids), default=0)
        left = self.decode(near[start:])
        fixed = bool(left) and self._encode(left)[-1:] == near[-1:]
        return self._behind([left, *self._neutral] if fixed else self._neutral, text)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, control tokens included; ids out of range are left out."""
        odd = bool(ids) and (min(ids) < 0 or max(ids) >= self.vocab_size)
        known = [i for i in ids if 0 <= i < self.vocab_size] if odd else ids
        if self._backend is not None:
            return str(self._backend.decode(known, skip_special_tokens=False))
        return str(self._tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def first_control(self, text: str) -> str:
        """The first control token in `text`, or nothing."""
        found = self._control.search(text)
        return found[0] if found else ""

    def tidy(self, value: Any, *, trusted: bool) -> Any:
        """`value` (text, or a tree of dicts and lists) well-formed and, unless `trusted`, with every control
        token in it broken by `SPLIT`."""
        if isinstance(value, str):
            text = well_formed(value)
            while not trusted and self._breakable.search(text):  # again: tokens spelled out may overlap
                text = self._breakable.sub(lambda m: m[0][0] + SPLIT + m[0][1:], text)
            return text
        if isinstance(value, list):
            return [self.tidy(v, trusted=trusted) for v in value]
        return {k: self.tidy(v, trusted=trusted) for k, v in value.items()} if isinstance(value, dict) else value

    def _behind(self, lefts: Sequence[str], text: str) -> list[int]:
        """Ids of `text` behind the first of `lefts` that ends at a border between tokens."""
        for left in lefts:
            head, whole = self._encode(left), self._encode(left + text)
            if head and whole[: len(head)] == head:
                return whole[len(head) :]
        return self._encode(text)

    def _adds_nothing(self, left: str) -> bool:
        """Whether a text behind `left` gets no prefix space."""
        head, whole = self._encode(left), self._encode(left + "a")
        return bool(head) and whole[: len(head)] == head and self.decode(whole) == self.decode(head) + "a"

    def _encode(self, text: str) -> list[int]:
        text = well_formed(text)
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates as U+FFFD; no tokenizer takes them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")
