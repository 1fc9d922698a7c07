"""An environment of your own: two hooks of plain text, checked, stepped by hand, and stepped by the dozen.

    python examples/01_custom_environment.py

The policy here is a line of Python, so that the whole story fits on one page. A model takes its place in
`llmgym train --env 01_custom_environment:me/Countdown-v0` (run it in this folder) and in the next examples.
"""

from __future__ import annotations

import re

import gymnasium
import numpy as np

import llm_gym
from llm_gym import Reply, TextEnv
from llm_gym.testing import check_environment


class Countdown(TextEnv):
    """Count down from a number, one number a reply; a wrong one ends the game."""

    reward_names = ("step", "finished")

    def open(self):
        """The first messages. Everything random comes from `self.np_random`, so the seed fixes the task."""
        self.next = int(self.np_random.integers(3, 6))
        return [{"role": "user", "content": f"Count down to 1, one number at a time. I say {self.next + 1}."}]

    def reply(self, text):
        """What the model said -> what follows. Rewards have names; the sum is what training maximises."""
        if not re.fullmatch(rf"\s*{self.next}\W*", text):
            return Reply(reward={"step": 0.0}, done=True)
        self.next -= 1
        if self.next == 0:
            return Reply(reward={"step": 0.1, "finished": 1.0}, done=True)
        return Reply(messages=[{"role": "user", "content": "Go on."}], reward={"step": 0.1})


llm_gym.register("me/Countdown-v0", entry_point=Countdown)


def count_down(messages):
    """The policy: one less than the last number anyone said."""
    return str(int(re.findall(r"\d+", " ".join(message["content"] for message in messages))[-1]) - 1)


def by_hand():
    """One episode. Outside, everything is token ids: a context comes in, a completion goes out."""
    env = gymnasium.make("me/Countdown-v0", render_mode="ansi")
    chat = env.unwrapped.chat  # the tokenizer and its chat template; only a scripted policy needs it
    obs, info = env.reset(seed=7)
    total, over = 0.0, False
    while not over:
        action = chat.encode_reply(count_down(info["messages"]))
        after, reward, terminated, truncated, info = env.step(action)
        assert np.array_equal(after[: len(obs) + len(action)], np.concatenate([obs, action]))  # nothing is re-encoded
        obs, total, over = after, total + reward, terminated or truncated
    print(env.render())
    print(f"{info['stop_reason']}: {total:.1f} = {info['rewards']}; {len(obs)} tokens\n")
    return total


def by_the_dozen():
    """Twelve environments in lockstep, by Gymnasium's own vector environment."""
    envs = gymnasium.make_vec("me/Countdown-v0", num_envs=12, vectorization_mode="sync")
    chat = envs.envs[0].unwrapped.chat
    _, infos = envs.reset(seed=0)
    finished = np.zeros(12, bool)
    while not finished.all():
        actions = tuple(chat.encode_reply(count_down(messages)) for messages in infos["messages"])
        _, _, terminated, _, infos = envs.step(actions)
        finished |= terminated
    envs.close()
    print(f"All {finished.sum()} episodes are over.")


if __name__ == "__main__":
    check_environment("me/Countdown-v0")  # Gymnasium's checks and ours: seeds, append-only contexts, rewards, ...
    print("The environment keeps the contract.\n")
    assert by_hand() > 1.0
    by_the_dozen()
