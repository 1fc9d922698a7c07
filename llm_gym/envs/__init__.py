"""The registered environments: a table of strings, so that nothing heavy is imported to list them.

Each row is `name -> (module:Class, one line about it)`; the id is `llm_gym/<name>`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium

from llm_gym.envs.installed import register_installed
from llm_gym.envs.parameters import check
from llm_gym.errors import SettingError, import_of, unknown

NAMESPACE = "llm_gym"

TABLE: dict[str, tuple[str, str]] = {
    "Arithmetic-v0": ("llm_gym.envs.arithmetic:Arithmetic", "procedural sums; unseen problems are held back by hash"),
    "Dataset-v0": ("llm_gym.envs.dataset:Dataset", "any data set and a reward function, both by name"),
    "GSM8K-v0": ("llm_gym.envs.gsm8k:GSM8K", "grade-school word problems, exact numeric answers"),
    "GuessNumber-v0": ("llm_gym.envs.guess_number:GuessNumber", "multi-turn game: the reference for your own"),
    "Gymnasium-v0": (
        "llm_gym.envs.adapters.gymnasium:GymnasiumWords",
        "Gymnasium's and MiniGrid's environments with discrete actions, in words",
    ),
    "MCPTool-v0": (
        "llm_gym.envs.tools.mcp.env:MCPTool",
        "tools of MCP servers; by default a calculator for large sums",
    ),
    "OpenEnv-v0": ("llm_gym.envs.adapters.openenv:OpenEnv", "the environment of an OpenEnv server, ours or any other"),
    "PythonTool-v0": ("llm_gym.envs.tools.python_tool:PythonTool", "questions to compute with a sandboxed interpreter"),
    "ReasoningGym-v0": (
        "llm_gym.envs.adapters.reasoning_gym:ReasoningGym",
        "105 data sets of reasoning-gym, made as needed",
    ),
    "TextArena-v0": ("llm_gym.envs.adapters.textarena:TextArena", "games of TextArena, alone or against an opponent"),
}


def register(env_id: str, entry_point: str | Callable[..., gymnasium.Env[Any, Any]], **given: Any) -> None:
    """`gymnasium.register` for an environment over `Tokens`: `gymnasium.make_vec` then gives a `TextVectorEnv`.

    >>> import gymnasium, llm_gym
    >>> llm_gym.register("me/Guess-v0", "llm_gym.envs.guess_number:GuessNumber", kwargs={"high": 7})
    >>> type(gymnasium.make_vec("me/Guess-v0", num_envs=2)).__name__
    'TextVectorEnv'
    >>> del gymnasium.registry["me/Guess-v0"]

    Args:
        env_id: such as `me/Guess-v0`.
        entry_point: the class, a function that makes one, or `package.module:name`.
        given: the other arguments of `gymnasium.register`. With `additional_wrappers`, which are put around single
            environments, `make_vec` gives Gymnasium's own vector environment.
    """
    if not given.get("additional_wrappers"):
        given = {"vector_entry_point": f"llm_gym.vector:{env_id}", **given}
    gymnasium.register(env_id, entry_point, **given)


def register_table() -> None:
    """Puts the table into Gymnasium's registry; doing it twice changes nothing."""
    for name, (entry_point, _) in TABLE.items():
        env_id = f"{NAMESPACE}/{name}"
        if env_id not in gymnasium.registry:
            register(env_id, entry_point)


def resolve(env_id: str) -> str:
    """The full id that `gymnasium.make` takes, for a full or a short one.

    `GSM8K-v0` means `llm_gym/GSM8K-v0`. `my_pkg.module:me/Guess-v0` imports the module, which
    registers the id. An id of Gymnasium's own is left alone.

    Raises:
        SettingError: no such id (the nearest one is named), or its module cannot be imported.
    """
    module, _, bare = env_id.rpartition(":")
    if module:
        import_of("env", module, env_id)
    names = (bare, f"{NAMESPACE}/{bare}")
    if not any(name in gymnasium.registry for name in names):
        register_installed()  # a package may have been half imported before
    for full in names:
        if full in gymnasium.registry:
            return full
    if "/" in bare and not module and not bare.startswith(f"{NAMESPACE}/"):
        raise SettingError(f"env: nothing has registered {bare!r}; name the module that does: module:{bare}.")
    others = (i for i, spec in gymnasium.registry.items() if "/" in i and "gymnasium." not in str(spec.entry_point))
    raise SettingError(unknown("env", bare, [*TABLE, *others]))


def make(env_id: str, /, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """`gymnasium.make` for a full or short id, without Gymnasium's checker around every step.

    Raises:
        SettingError: no such id or keyword argument (the nearest one is named), or a value of the wrong type.
    """
    full = resolve(env_id)
    check(full, {name: value for name, value in kwargs.items() if name != "max_episode_steps"})  # Gymnasium's own
    try:
        return gymnasium.make(full, disable_env_checker=True, **kwargs)
    except TypeError as error:
        reason = str(error).partition(" was raised from the environment creator")[0]
        raise SettingError(f"{full}: cannot be made with {kwargs} ({reason}).") from error
