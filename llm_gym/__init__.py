"""Gymnasium for language models, and a trainer that any Gymnasium user can read.

Importing this registers the environments (`gymnasium.make("llm_gym/GSM8K-v0")`). The public names
are imported when they are first used, so that this costs no torch and no transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_gym.envs import register, register_table
from llm_gym.envs.installed import register_installed
from llm_gym.lazy import forward_moved, names

if TYPE_CHECKING:
    from llm_gym.chat import Chat, load_chat, load_tokenizer
    from llm_gym.core import Completion, Episode, Group, Message, Messages, Sampling, Span, StopReason, Trajectory, Turn
    from llm_gym.env import Reply, TextEnv
    from llm_gym.errors import BadReply, LLMGymError
    from llm_gym.policies import make_policy
    from llm_gym.rollouts.driver import rollout
    from llm_gym.spaces import Tokens
    from llm_gym.testing import check_environment
    from llm_gym.vector import TextVectorEnv

__version__ = "0.1.0"

_MODULES = {
    "chat": ("Chat", "load_chat", "load_tokenizer"),
    "core": (
        "Completion",
        "Episode",
        "Group",
        "Message",
        "Messages",
        "Sampling",
        "Span",
        "StopReason",
        "Trajectory",
        "Turn",
    ),
    "env": ("Reply", "TextEnv"),
    "errors": ("BadReply", "LLMGymError"),
    "policies": ("make_policy",),
    "rollouts.driver": ("rollout",),
    "spaces": ("Tokens",),
    "testing": ("check_environment",),
    "vector": ("TextVectorEnv",),
}
__all__ = [  # noqa: RUF022 (sorted by module, as the table above)
    "Chat", "load_chat", "load_tokenizer",
    "Completion", "Episode", "Group", "Message", "Messages", "Sampling", "Span", "StopReason", "Trajectory", "Turn",
    "Reply", "TextEnv", "LLMGymError", "make_policy", "rollout", "Tokens", "check_environment", "TextVectorEnv",
    "register", "BadReply",
]  # fmt: skip

register_table()
forward_moved()
__getattr__ = names(__name__, _MODULES)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted([*globals(), *__all__])


register_installed()  # last: what it imports imports this
