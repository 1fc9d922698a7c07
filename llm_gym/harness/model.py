"""Loading a causal language model for training, and its two halves: body and head."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from llm_gym import embedded
from llm_gym.errors import ConfigError
from llm_gym.harness.batching import MicroBatch
from llm_gym.harness.lora import LoraConfig as LoraConfig
from llm_gym.harness.lora import add_adapters, check_folding
from llm_gym.harness.memory import MemoryConfig, check_memory, economise
from llm_gym.harness.mlps import fuse_mlps
from llm_gym.harness.norms import fuse_norms
from llm_gym.harness.packing import NAME, Form, Layout
from llm_gym.policies.folding import beneath, weight_of, whole
from llm_gym.policies.folding import plain_tensors as plain_tensors
from llm_gym.policies.plain import is_adapter, load_base, recorded_base
from llm_gym.policies.plain import merged as merged

log = logging.getLogger(__name__)


def load_model(
    path: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    lora: LoraConfig | None = None,
    memory: MemoryConfig | None = None,
) -> Any:
    """A causal language model, ready to train.

    Args:
        path: a folder in the Hugging Face layout, or a hub id; None: the embedded model. An adapter's folder is that
            adapter folded into its base.
        dtype: of the master weights. Keep float32: an update of 1e-6 vanishes when added to a bfloat16 weight.
            Frozen weights beneath adapters are held as `lora.base` says.
        device: where the weights live.
        lora: adapters to add; they are float32 whatever `dtype` is.
        memory: what is trained, and what is kept for backward.

    Returns:
        A transformers model, or a peft model around it, in eval mode (no dropout, ever).

    Raises:
        ConfigError: `path` is no model, said before anything is loaded.
    """
    config = _config(embedded.PATH if path is None else path)
    check_memory(memory, lora, layers=config.get_text_config().num_hidden_layers, device=device)
    hf_logging.disable_progress_bar()
    held, kind = ("float32", dtype) if lora is None or lora.base == "float32" else (lora.base, None)
    model = load_base(embedded.PATH if path is None else path, held, dtype=kind, device=device, config=config)
    return prepare(model, device=device, lora=lora, memory=memory)


def new_model(config: Mapping[str, Any], *, seed: int, device: torch.device | str = "cpu") -> Any:
    """A freshly initialised float32 model of a Hugging Face config given as a mapping (`model_type` and fields).

    Raises:
        ConfigError: the mapping names no known model type.
    """
    fields = dict(config)
    try:
        hf_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"init: want a config with a known model_type, got {config!r}.") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    return prepare(model, device=device)


def prepare(
    model: Any,
    *,
    device: torch.device | str = "cpu",
    lora: LoraConfig | None = None,
    memory: MemoryConfig | None = None,
) -> Any:
    """Faster norms and MLPs, adapters if wanted, thrift with memory, eval mode, on the device."""
    fuse_norms(model)
    fuse_mlps(model)
    model = model.eval() if hasattr(model, "quantization_method") else model.to(device).eval()  # 4 bits are there
    if lora is not None:
        model = add_adapters(model, lora).eval()
    economise(model, memory or MemoryConfig())
    if lora is not None:
        check_folding(model)
    return model


def _config(path: str | Path) -> Any:
    """The model's config; one sentence if there is none."""
    folder = Path(path)
    local = folder.exists() or folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1
    if local and not (folder / "config.json").is_file():
        if is_adapter(folder):
            return _config(recorded_base(folder)[0] or embedded.PATH)
        what = "no such folder" if not folder.exists() else "it has no config.json"
        raise ConfigError(f"model: {str(path)!r} is not a model folder: {what}.")
    try:
        return AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model: {str(path)!r} is neither a model folder nor a hub id that can be read ({reason})."
        ) from error


# --- body and head ----------------------------------------------------------------------------------------


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
        return weight_of(head), beneath(head)[0].bias

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
        return self.scale * nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()

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


# --- in and out --------------------------------------------------------------------------------------------


def adapter_tensors(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter's tensors by the names that peft saves them under, and its `adapter_config.json` as a mapping.

    Tensors come whole, as from `plain_tensors`.
    """
    import peft

    config = next(iter(model.peft_config.values())).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)  # frozen ones are the base's
    return {name: whole(tensor.detach()) for name, tensor in state.items()}, plain


def export(model: Any, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes a Hugging Face folder, adapters folded in, converted to `dtype` if given."""
    plain = merged(model)
    (plain if dtype is None else plain.to(dtype)).save_pretrained(str(folder))
