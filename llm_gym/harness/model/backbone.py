"""A causal language model as two halves: its body makes hidden states of tokens, its head logits of these."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llm_gym.errors import ConfigError
from llm_gym.harness.model.attention import NAME, Form, Layout
from llm_gym.harness.model.cpu_mlp import fuse_mlps
from llm_gym.harness.model.cpu_rmsnorm import fuse_norms
from llm_gym.harness.types import MicroBatch
from llm_gym.models.folding import beneath, weight_of
from llm_gym.policies.builtin.self_test import SelfTest, forget_lengths, plain

log = logging.getLogger(__name__)

Way = Literal["packed", "padded", "alone"]
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Fields of configs that hold a soft cap of the logits."""


class Rows:
    """The ways to make hidden states of a causal LM's rows, and the one that is taken.

    Args:
        causal: the model, without peft around it.
    """

    def __init__(self, causal: Any) -> None:
        self.causal = causal
        self.config = causal.config.get_text_config()
        self.from_head = False
        """Whether hidden states are what goes into the head, which something stands before; else the decoder's."""
        self.packed = False
        """Whether rows that share a forward are packed; padded otherwise."""
        self.together = math.inf
        """Tokens of the longest row that may share a forward; longer ones go alone."""
        self.form: Form = "auto"
        """How attention over packed rows is computed (see `attention`)."""

    @property
    def shares(self) -> bool:
        """Whether rows may share prompts (`MicroBatch.parents`)."""
        return self.packed and self.together == math.inf

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Last hidden states of a micro-batch's input tokens, [N, H].

        Raises:
            ValueError: its rows share prompts, which this model cannot read.
        """
        if batch.parents and not self.shares:
            raise ValueError("batch: its rows share prompts, which this model cannot read; pack with share=False.")
        if self.packed and (self.together == math.inf or max(batch.lengths) <= self.together):
            return self._packed(batch.tokens, batch.lengths, batch.positions, batch.parents)
        rows = torch.split(batch.tokens, list(batch.lengths))
        short = [i for i, row in enumerate(rows) if len(row) <= self.together]
        found = dict(zip(short, self.of([rows[i] for i in short], "packed" if self.packed else "padded"), strict=True))
        return torch.cat([found[i] if i in found else self._alone(row) for i, row in enumerate(rows)])

    def of(self, rows: Sequence[Tensor], way: Way) -> Sequence[Tensor]:
        """Last hidden states [n, H] of each of some rows of tokens [n]."""
        if way == "alone" or not rows:
            return [self._alone(row) for row in rows]
        lengths = [len(row) for row in rows]
        if way == "padded":
            return torch.split(self._padded(rows), lengths)
        positions = torch.cat([torch.arange(n, device=rows[0].device) for n in lengths])
        return torch.split(self._packed(torch.cat(list(rows)), lengths, positions), lengths)

    def logits(self, rows: Sequence[Tensor], way: Way, scale: float = 1.0, cap: float | None = None) -> list[Tensor]:
        """Logits [n, V] of each row as the head makes them of hidden states."""
        weight, bias = self.head()
        bias = None if bias is None else bias.to(weight.dtype)  # an adapted weight is finer than it
        hidden = (each.detach().to(weight.dtype) for each in self.of(rows, way))
        linear = [scale * nn.functional.linear(each, weight.detach(), bias).float().detach() for each in hidden]
        return linear if cap is None else [cap * torch.tanh(each / cap) for each in linear]

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Head weight [V, H] and bias ([V] or None) as they act now, adapters included."""
        head = self.causal.get_output_embeddings()
        return weight_of(head), beneath(head)[0].bias

    def _packed(self, tokens: Tensor, lengths: Sequence[int], positions: Tensor, parents: Sequence[int] = ()) -> Tensor:
        layout = Layout.of(lengths, tokens.device, parents, self.form)
        unread = torch.full((1, 1, 1, 1), torch.nan, device=tokens.device)
        hidden = self._run(input_ids=tokens[None], position_ids=positions[None], attention_mask=unread, layout=layout)
        if len(layout.seen) != self.config.num_hidden_layers:
            raise RuntimeError(
                f"packing: {len(layout.seen)} of {self.config.num_hidden_layers} layers read the layout; "
                f"the attention implementation is {self.causal.config._attn_implementation!r}, want {NAME!r}."
            )
        return hidden[0]

    def _padded(self, rows: Sequence[Tensor]) -> Tensor:
        # No mask: what stands to the right of a row is not seen, and padding that sees nothing would be NaN.
        padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=padded.device)
        return self._run(input_ids=padded)[lengths[:, None] > torch.arange(padded.shape[1], device=padded.device)]

    def _alone(self, row: Tensor) -> Tensor:
        return self._run(input_ids=row[None])[0]

    def _run(self, **inputs: Any) -> Tensor:
        """Hidden states of a forward without a cache, [rows, tokens, H]."""
        forget_lengths(self.causal)
        if self.from_head:
            return _before_head(self.causal, use_cache=False, **inputs)
        hidden: Tensor = self.causal.get_decoder()(use_cache=False, **inputs).last_hidden_state
        return hidden


class _Reached(Exception):
    """Carries what came to the head out of a forward whose head is not wanted."""


def _before_head(causal: Any, **inputs: Any) -> Tensor:
    """What goes into the head, for models that do something between the decoder's end and their head's matrix."""

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0])

    hook = causal.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        causal(**inputs)
    except _Reached as reached:
        hidden: Tensor = reached.args[0]
        return hidden
    finally:
        hook.remove()
    raise RuntimeError("the model made logits without its output embeddings")


class Backbone(Rows):
    """A causal LM as two halves: token ids to hidden states, and the weights that make logits of them.

    On construction a small copy of the model is put to the test (see `policies.builtin.self_test`), then the model
    itself on a few tokens: rows are packed where that gives what each row alone gives, else padded, else computed
    one by one;
    perhaps one by one only where they are longer than what the model was first trained on. Logits are
    `scale * (hidden @ weight.T + bias)`, or `softcap * tanh(that / softcap)`.

    Raises:
        ConfigError: logits are of no such form, or those of a token depend on what follows it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model.get_base_model() if hasattr(model, "peft_config") else model)
        self.model = model
        self.scale = 1.0
        """Factor between `hidden @ weight.T + bias` and the model's logits, before a soft cap."""
        self.softcap: float | None = None
        """Soft cap of the logits (Gemma 2, https://arxiv.org/abs/2408.00118)."""
        self._settle(examine(self.causal))

    def without_adapters(self) -> AbstractContextManager[Any]:
        """The base model while the context lasts (a no-op for a model without adapters)."""
        manager: AbstractContextManager[Any] = (
            self.model.disable_adapter() if hasattr(self.model, "peft_config") else nullcontext()
        )
        return manager

    @torch.no_grad()
    def _settle(self, verdict: Verdict) -> None:
        """Takes what the copy allowed as far as the model itself confirms it, on a few tokens; finds the scale."""
        random = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.config.vocab_size, (12,), generator=random)
        rows = torch.split(tokens.to(next(self.causal.parameters()).device), [7, 5])
        self.from_head, self.together = verdict.from_head, verdict.together
        self.causal.set_attn_implementation(verdict.attention)
        want = torch.cat([plain(self.causal, row) for row in rows])
        self.softcap = None if verdict.cap is None else float(getattr(self.config, verdict.cap))
        exact = next(self.causal.parameters()).dtype in (torch.float32, torch.float64)
        close = partial(_close, tolerance=1e-3 if exact else 3e-2)
        self.scale = _scale(torch.cat(self.logits(rows, "alone")), want, self.softcap)
        for way in _ways(verdict.way):
            self.causal.set_attn_implementation(NAME if way == "packed" else verdict.attention)
            try:
                if close(torch.cat(self.logits(rows, way, self.scale, self.softcap)), want):
                    self.packed = way == "packed"
                    self.together = 0 if way == "alone" else self.together
                    self._tell(way)
                    return
            except Exception as error:
                log.debug("%s rows: %r", way, error)
        raise _odd_head(self.causal)

    def _tell(self, way: Way) -> None:
        """Says what is not as usual."""
        name = type(self.causal).__name__
        if way == "alone":
            log.warning("neither packing nor padding is exact for %s: rows are computed one by one.", name)
        elif way == "padded":
            log.warning("packing is not exact for %s: rows are padded.", name)
        if 0 < self.together < math.inf:
            log.warning("%s: rows of more than %d tokens are computed one by one.", name, self.together)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How hidden states can be computed so that they are those of each row alone; fields as in `Rows`."""

    way: Way
    together: float
    attention: str
    """Transformers' attention of what is not packed."""
    from_head: bool
    cap: str | None
    """The field of the config that caps the logits."""


_VERDICTS: dict[tuple[type, str], Verdict] = {}


def examine(causal: Any) -> Verdict:
    """Puts a small copy of a model to the test; once for each class and config.

    Raises:
        ConfigError: the model cannot be trained.
    """
    key = type(causal), json.dumps(causal.config.to_dict(), sort_keys=True, default=str)
    if key not in _VERDICTS:
        _VERDICTS[key] = _examine(causal)
    return _VERDICTS[key]


def _examine(causal: Any) -> Verdict:
    name = type(causal).__name__
    try:
        test = SelfTest(causal)
    except Exception as error:
        raise ConfigError(f"model: {name} cannot be trained: a plain forward of one row fails ({error!r}).") from error
    if not test.causal:
        raise ConfigError(
            f"model: {name} cannot be trained: a token's logits depend on what follows it; if it is an encoder, "
            "load it with is_decoder=true in its config."
        )
    before = test.model.config._attn_implementation
    try:
        if test.copied:  # fused layers have another forward where gradients are wanted
            fuse_norms(test.model.requires_grad_(True))
            fuse_mlps(test.model)
        with torch.set_grad_enabled(test.copied):
            return _verdict(test)
    finally:
        test.model.set_attn_implementation(before)


def _verdict(test: SelfTest) -> Verdict:
    rows = Rows(test.model)

    def bound(way: Way) -> float:
        return test.bound(lambda _, some: rows.logits(some, way, scale, cap))

    for rows.from_head in (False, True):
        for attention in ("sdpa", "eager"):
            for field in (*(f for f in CAPS if getattr(rows.config, f, None)), None):
                try:
                    test.model.set_attn_implementation(attention)
                    cap = None if field is None else float(getattr(rows.config, field))
                    scale = _scale(torch.cat(rows.logits(test.rows, "alone")), torch.cat(test.want), cap)
                except Exception as error:
                    log.debug("%s, %s: %r", attention, field, error)
                    continue
                if bound("alone") == test.unproven:
                    return Verdict(*_best(test, bound, attention), attention, rows.from_head, field)
    raise _odd_head(test.model)


def _best(test: SelfTest, bound: Any, attention: str) -> tuple[Way, float]:
    """The way that holds for the longest rows, the quicker of two that are equal, and up to which length it holds."""
    padded = bound("padded")
    if attention == "sdpa":
        test.model.set_attn_implementation(NAME)
        packed = bound("packed")
        if packed >= padded and packed and (packed == math.inf or bound("alone") == test.unproven):
            return "packed", packed
    return ("padded", padded) if padded else ("alone", 0)


def _ways(first: Way) -> tuple[Way, ...]:
    """What is tried on the model itself, the quickest first."""
    every: tuple[Way, ...] = ("packed", "padded", "alone")
    return every[every.index(first) :]


def _scale(linear: Tensor, logits: Tensor, cap: float | None) -> float:
    """The factor from `linear` to logits before their cap (Granite and Cohere have one); 1.0 exactly where none is."""
    logits, linear = logits.double(), linear.double()
    if cap is not None:
        inside = logits.abs() < 0.9 * cap
        linear, logits = linear[inside], cap * torch.atanh(logits[inside] / cap)
    factor = float((linear * logits).sum() / (linear * linear).sum())
    return 1.0 if abs(factor - 1) < 1e-3 else factor


def _odd_head(causal: Any) -> ConfigError:
    return ConfigError(
        f"model: the logits of {type(causal).__name__} are not a linear map of its last hidden states, soft-capped or "
        "not; such heads cannot be trained here."
    )


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal up to the rounding of the weights' type; NaN is not."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
