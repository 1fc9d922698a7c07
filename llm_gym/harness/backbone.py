"""A causal language model as two halves: its body makes hidden states of tokens, its head logits of these."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llm_gym.errors import ConfigError
from llm_gym.harness.batching import MicroBatch
from llm_gym.harness.lora import weight_of
from llm_gym.harness.packing import NAME, Form, Layout

log = logging.getLogger(__name__)


class Body:
    """A causal LM as two halves: token ids to hidden states, and the weights that make logits of them.

    On construction a few random tokens go through the whole model, once plainly and once packed. If the
    logits disagree (sliding windows, recurrent layers, attention sinks, ...), rows are padded instead; if
    even then they are not `scale * (hidden @ weight.T + bias)`, the model is refused.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "peft_config") else model
        self.decoder = self.causal.get_decoder()
        self.config = self.causal.config.get_text_config()
        self.scale = 1.0
        """Factor between `hidden @ weight.T + bias` and the model's logits."""
        self.form: Form = "auto"
        """How attention over packed rows is computed (see `packing`)."""
        self.packed = self._packs()

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Last hidden states of a micro-batch's input tokens, [N, H]."""
        return self._packed(batch) if self.packed else self._padded(batch)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Head weight [V, H] and bias ([V] or None) as they act now, adapters included."""
        head = self.causal.get_output_embeddings()
        if hasattr(head, "modules_to_save"):  # a fully trained copy under peft
            head = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
        return weight_of(head), getattr(head, "base_layer", head).bias

    def without_adapters(self) -> AbstractContextManager[Any]:
        """The base model while the context lasts (a no-op for a model without adapters)."""
        manager: AbstractContextManager[Any] = (
            self.model.disable_adapter() if hasattr(self.model, "peft_config") else nullcontext()
        )
        return manager

    def _packed(self, batch: MicroBatch) -> Tensor:
        tokens = batch.tokens
        layout = Layout.of(batch.lengths, tokens.device, batch.parents, self.form)
        unread = torch.full((1, 1, 1, 1), torch.nan, device=tokens.device)
        out = self.decoder(
            input_ids=tokens[None],
            position_ids=batch.positions[None],
            attention_mask=unread,
            use_cache=False,
            layout=layout,
        )
        if len(layout.seen) != self.config.num_hidden_layers:
            raise RuntimeError(
                f"packing: {len(layout.seen)} of {self.config.num_hidden_layers} layers read the layout; "
                f"the attention implementation is {self.causal.config._attn_implementation!r}, want {NAME!r}."
            )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    def _padded(self, batch: MicroBatch) -> Tensor:
        if batch.parents:
            raise ValueError("batch: its rows share prompts, which this model cannot read; pack with share=False.")
        width = max(batch.lengths)
        real = torch.tensor(batch.lengths, device=batch.tokens.device)[:, None] > torch.arange(
            width, device=batch.tokens.device
        )
        rows = batch.tokens.new_zeros(real.shape).masked_scatter_(real, batch.tokens)
        out = self.decoder(input_ids=rows, attention_mask=real.long(), use_cache=False)
        hidden: Tensor = out.last_hidden_state[real]
        return hidden

    @torch.no_grad()
    def _packs(self) -> bool:
        """Whether packing is exact here; sets `scale` and the attention implementation."""
        batch = _probe(self.config.vocab_size, next(self.causal.parameters()).device)
        capped = getattr(self.config, "attn_logit_softcapping", None)  # which `sdpa` leaves out without a word
        plainly = "sdpa" if getattr(self.causal, "_supports_sdpa", True) and not capped else "eager"
        self.causal.set_attn_implementation(plainly)
        rows = torch.split(batch.tokens, list(batch.lengths))
        logits = torch.cat([self.causal(input_ids=row[None]).logits[0] for row in rows]).float()
        self.scale = self._scale(self._logits(self._padded(batch)), logits)
        kinds = set(getattr(self.config, "layer_types", None) or ["full_attention"])
        if kinds == {"full_attention"} and plainly == "sdpa":
            self.causal.set_attn_implementation(NAME)
            try:
                if self._close(self._logits(self._packed(batch)), logits):
                    return True
            except RuntimeError as error:
                log.debug("packing: %s", error)
            self.causal.set_attn_implementation(plainly)
        log.warning("packing is not exact for %s (layers: %s): rows are padded.", type(self.causal).__name__, kinds)
        return False

    def _logits(self, hidden: Tensor) -> Tensor:
        weight, bias = self.head()
        return self.scale * nn.functional.linear(hidden, weight, bias).float()

    def _scale(self, linear: Tensor, logits: Tensor) -> float:
        """The factor between them (Granite and Cohere have one); 1.0 exactly where there is none."""
        if linear.shape == logits.shape and not getattr(self.config, "final_logit_softcapping", None):
            factor = float((linear * logits).sum() / (linear * linear).sum())
            factor = 1.0 if abs(factor - 1) < 1e-3 else factor
            if self._close(factor * linear, logits):
                return factor
        raise ConfigError(
            f"model: the logits of {type(self.causal).__name__} are not a linear map of its last hidden states "
            "(a soft cap?); such heads are not supported."
        )

    def _close(self, a: Tensor, b: Tensor) -> bool:
        """Equal up to the rounding of the weights' type; NaN is not."""
        exact = next(self.causal.parameters()).dtype in (torch.float32, torch.float64)
        return bool((a - b).abs().max() <= (1e-3 if exact else 3e-2) * b.abs().max())


def _probe(vocabulary: int, device: torch.device) -> MicroBatch:
    """Two short sequences of random tokens, nothing trained."""
    lengths = (7, 5)
    tokens = torch.randint(0, vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
    empty = tokens[:0]
    return MicroBatch(tokens, positions, lengths, empty, empty, empty, empty, empty, empty)
