"""An environment whose model can call a function: the smallest one, played by hand and by a script."""

from typing import Any

import llm_gym
from llm_gym.envs.tools import ToolEnv
from llm_gym.envs.tools.calculator import evaluate


def calculator(expression: str) -> str:
    """Evaluates an arithmetic expression.

    Args:
        expression: such as 12*(3+4).
    """
    return str(evaluate(expression))


class Products(ToolEnv):
    """A product too large to do by heart."""

    reward_names = ("correct",)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__([calculator], **kwargs)

    def open(self) -> list[dict[str, Any]]:
        self.a, self.b = (int(x) for x in self.np_random.integers(100, 10_000, 2))
        return [{"role": "user", "content": f"What is {self.a} * {self.b}?"}]

    def final(self, text: str) -> llm_gym.Reply:
        """What follows a reply that calls no tool."""
        return llm_gym.Reply(reward={"correct": float(str(self.a * self.b) in text)}, done=True)


# By hand: one call, its result, the answer.
env = Products(render_mode="ansi")
context, info = env.reset(seed=7)
print("the model is shown:", info["tools"][0]["function"])
for reply in (env.call_text("calculator", expression=f"{env.a}*{env.b}"), f"Answer: {env.a * env.b}"):
    context, reward, terminated, truncated, info = env.step(env.chat.encode_reply(reply))
print(env.render())
print("rewards:", info["rewards"])
assert terminated
assert info["rewards"]["correct"] == 1.0

# By the embedded model, which calls a tool about a third of the time and then mostly gets it right.
policy = llm_gym.make_policy()
episodes = llm_gym.rollout(Products, policy, seeds=range(32))
called = [episode for episode in episodes if episode.rewards["tool_calls"]]
right = sum(episode.rewards["correct"] for episode in called)
print(f"{len(called)} of {len(episodes)} episodes called the calculator, {right:.0f} of them were right")
assert called
assert right >= len(called) / 2
assert not any(episode.error for episode in episodes)
policy.close()
env.close()
