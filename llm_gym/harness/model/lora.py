"""Low-rank adapters through peft: their kinds, the layers they go into, and the frozen weights beneath them."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llm_gym.errors import ConfigError, unknown
from llm_gym.harness.bounds import Within
from llm_gym.harness.model.layers import decoder_layers, parse_layers
from llm_gym.harness.registry import require
from llm_gym.harness.settings import checked
from llm_gym.models.folding import base_of, beneath, places, plain_tensors
from llm_gym.models.plain import HELD, full_precision, plain_class, plain_config

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},  # https://arxiv.org/abs/2106.09685
    "rslora": {"use_rslora": True},  # https://arxiv.org/abs/2312.03732
    "dora": {"use_dora": True},  # https://arxiv.org/abs/2402.09353
}
"""Name -> what peft is told."""


MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
MAMBAS_OWN = ("conv1d", "out_proj")
"""Layers of these models that peft refuses: CUDA kernels read their weights."""
SAME_NUMBERS = (torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.Tensor.data.__get__)  # type: ignore[attr-defined]
"""Attributes of a weight whose reading is a use of its numbers (that of its type is none)."""


@checked("lora")
@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank adapters (https://arxiv.org/abs/2106.09685), trained instead of the model's own weights."""

    rank: Annotated[int, Within("[1, inf)")] = 16
    alpha: Annotated[float, Within("(0, inf)")] = 32.0
    """The adapter's output is scaled by alpha / rank; for `rslora` by alpha / sqrt(rank)."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear`: every one but the head."""
    kind: str = "lora"
    """`lora`; `rslora` (scaled for high ranks); `dora` (the length of each row of the weights is trained apart)."""
    layers: str = ""
    """Decoder layers that get adapters, such as `20-31` or `-4` (the last four); empty: all."""
    base: str = "float32"
    """What the frozen weights are held in: `float32`, `bfloat16`, or `nf4` (QLoRA, https://arxiv.org/abs/2305.14314:
    4 bits and a scale for each block; needs bitsandbytes)."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules that are trained whole beside the adapters, such as `lm_head` or `norm`; needs base float32."""
    dropout: float = 0.0
    """Must be 0: with dropout, old and new log-probabilities would be of two different functions."""

    def __post_init__(self) -> None:
        for name, valid in (("kind", KINDS), ("base", HELD)):
            if getattr(self, name) not in valid:
                raise ConfigError(unknown(f"lora.{name}", getattr(self, name), valid))
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ConfigError(
                    f"lora.target_modules: got {self.target_modules!r}, want all-linear, a list of names, or a pattern "
                    f"({error})."
                ) from error
        if self.modules_to_save and self.base != "float32":
            raise ConfigError(
                f"lora.modules_to_save: got {list(self.modules_to_save)} with lora.base {self.base!r}, want 'float32': "
                "what is trained whole is float32, and the layers around it must take that."
            )
        if self.dropout:
            raise ConfigError(
                f"lora.dropout: got {self.dropout!r}, want 0: with dropout, old and new log-probabilities "
                "would be of two different functions."
            )

    @property
    def named(self) -> tuple[str, ...]:
        """The layers that are asked for by name."""
        if isinstance(self.target_modules, str):
            whole = re.fullmatch(r"[\w.]+", self.target_modules) and self.target_modules != "all-linear"
            return (self.target_modules,) if whole else ()
        return self.target_modules

    @property
    def served_apart(self) -> bool:
        """Whether vLLM can hold the adapter apart from the weights (not DoRA's, nor modules trained whole)."""
        return self.kind != "dora" and not self.modules_to_save

    def check(self, layers: int) -> None:
        """Looks at everything that needs no weights.

        Args:
            layers: of the model's decoder.

        Raises:
            ConfigError: a layer that the model lacks, or a package that is not installed.
        """
        if self.layers:
            parse_layers(self.layers, layers, "lora.layers")
        require("bitsandbytes" if self.base == "nf4" else None, f"lora.base: {self.base!r}")


def check_targets(model: Any, lora: LoraConfig) -> None:
    """Looks whether a model (of no weights, perhaps) has every layer that is asked for by name.

    Raises:
        ConfigError: it has not; the nearest is named.
    """
    if any(parameter.ndim > 2 for parameter in model.parameters()):
        return  # fused experts go by names that are no layer's
    leaves = {n.rpartition(".")[2] for n, m in model.named_modules() if not m._modules and m._parameters}
    every = {name for name, _ in model.named_modules()}
    for setting, wanted in (("target_modules", lora.named), ("modules_to_save", lora.modules_to_save)):
        for name in wanted:
            if not any(n == name or n.endswith(f".{name}") for n in every):
                raise ConfigError(unknown(f"lora.{setting}", name, leaves))


def add_adapters(model: Any, lora: LoraConfig) -> Any:
    """A peft model around the model; the adapters are float32 and change nothing yet.

    Raises:
        ConfigError: no layer has a name that is asked for.
    """
    import peft

    targets: Any = list(lora.named) or lora.target_modules
    numbers, unfit = None, read_directly(model)
    named = {name for name in unfit if isinstance(targets, list) and name.rpartition(".")[2] in targets}
    if named:
        raise ConfigError(
            f"lora.target_modules: got {min(named).rpartition('.')[2]!r}, but the model does more with that layer than "
            "call it for a product, so an adapter around it would not act as its weight does; leave it out."
        )
    if lora.layers:
        layers = decoder_layers(model)
        numbers, _ = parse_layers(lora.layers, len(layers), "lora.layers")
        if targets == "all-linear":  # peft takes no numbers with it
            found = {name.rpartition(".")[2] for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
            targets = sorted(found - {name.rpartition(".")[2] for name in unfit})
        elif isinstance(targets, str):
            targets = [targets]
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        layers_to_transform=numbers,
        exclude_modules=sorted(unfit) if targets == "all-linear" and unfit else None,
        modules_to_save=list(lora.modules_to_save) or None,
        task_type="CAUSAL_LM",
        **KINDS[lora.kind],
    )
    try:
        with warnings.catch_warnings():  # of tied weights: `plain_config` unties them
            warnings.simplefilter("ignore", UserWarning)
            made = peft.get_peft_model(model, config)
    except ValueError as error:
        if "ParamWrapper" in str(error):  # peft's word for what adapts a parameter that is no layer's
            raise ConfigError(
                f"lora.kind: {lora.kind!r} does not go into experts that are fused; use 'lora', or name layers of the "
                "attention in lora.target_modules, such as [q_proj, v_proj]."
            ) from error
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())}") from error
    full_precision(made)
    return made


@torch.no_grad()
def read_directly(model: Any) -> set[str]:
    """Linear layers that an adapter cannot be put around: their weight is read, or they give more than a product.

    Found in a forward of two tokens: a router that gives a tuple, a projection whose weight goes into a kernel. peft
    knows of some more, which other kernels read.
    """
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    owners = {id(module.weight): name for name, module in linear.items()}
    own, unfit = set[int](), set[str]()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") != "__get__" or func in SAME_NUMBERS:
                read = {id(value) for value in (*args, *(kwargs or {}).values())} & owners.keys()
                unfit.update(owners[weight] for weight in read - own)
            return func(*args, **(kwargs or {}))

    def enter(module: Any, args: Any) -> None:
        own.add(id(module.weight))

    def leave(module: Any, args: Any, output: Any) -> None:
        own.discard(id(module.weight))
        if not isinstance(output, Tensor) or output.shape[-1] != module.out_features:
            unfit.add(owners[id(module.weight)])

    hooks = [m.register_forward_pre_hook(enter) for m in linear.values()]
    hooks += [m.register_forward_hook(leave) for m in linear.values()]
    try:
        with Watch():
            model(input_ids=torch.tensor([[1, 2]], device=next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if model.config.get_text_config().model_type in MAMBAS:
        unfit |= {name for name in linear if name.rpartition(".")[2] in MAMBAS_OWN}
    return unfit


@torch.no_grad()
def check_folding(model: Any) -> None:
    """Proves that what is sent and saved is what is trained, without a second model.

    The plain tensors must have the names of the plain model. And one adapted layer of every kind, on what reaches it
    in a forward of a few tokens, must give what the plain layer gives on its folded weight. Adapters, which change
    nothing yet, are moved meanwhile.

    Raises:
        ConfigError: an adapter that cannot be folded.
    """
    base = base_of(model)
    with torch.device("meta"):
        wanted = plain_class(base)(plain_config(model)).state_dict().keys()
    if wrong := wanted ^ {place.name for place in places(base)}:
        raise ConfigError(f"lora: the plain model of these adapters is not known: {sorted(wrong)[0]!r} does not fit.")
    generator, proven, handles = torch.Generator().manual_seed(0), set(), []
    for name, module in base.named_modules():
        leaf, around = beneath(module)
        kind = (type(module), type(leaf), name.rpartition(".")[2])
        if "base_layer" in module._modules and not name.endswith("base_layer") and around and kind not in proven:
            proven.add(kind)
            handles.append(module.register_forward_hook(partial(_compare, name), with_kwargs=True))
    moved = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n}
    before = {name: parameter.clone() for name, parameter in moved.items()}
    try:
        for name, parameter in moved.items():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(parameter * (1 + 0.1 * noise) if "magnitude" in name else parameter + 0.1 * noise)
        ids = torch.randint(0, base.config.get_text_config().vocab_size, (1, 8), generator=generator)
        base(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for name, parameter in moved.items():
            parameter.copy_(before[name])
        for handle in handles:
            handle.remove()


def _compare(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Raises ConfigError if a layer's output is not that of the plain layer beneath it on its folded weights."""
    leaf, tensors = beneath(module)[0], dict(plain_tensors(module))
    kind = next(iter(tensors.values())).dtype
    half = kind not in (torch.float32, torch.float64) or any(p.element_size() < 4 for p in leaf.parameters())
    kind = torch.promote_types(kind, torch.float32)
    tensors = {n: t.to(kind) for n, t in tensors.items()}
    given = [a.to(kind) if isinstance(a, Tensor) and a.is_floating_point() else a for a in (*args, *kwargs.values())]
    if getattr(leaf, "quant_state", None) is not None:
        want = nn.functional.linear(given[0], tensors["weight"], tensors.get("bias"))
    else:
        named = dict(zip(kwargs, given[len(args) :], strict=True))
        want = torch.func.functional_call(leaf, tensors, tuple(given[: len(args)]), named)
    got, want = (found[0] if isinstance(found, tuple) else found for found in (output, want))
    off = float((got.to(kind) - want).abs().max() / want.abs().max().clamp_min(1e-12))
    if not off <= (3e-2 if half else 1e-3):
        raise ConfigError(
            f"lora: the adapter on {name!r} cannot be folded into plain weights (its layer is off by {off:.1e} of its "
            "largest output); leave it out of lora.target_modules."
        )
