"""The two halves that a trainer joins: a policy that completes contexts, and episodes played against it.

python examples/03_policy_and_rollout.py
"""

import numpy as np

import llm_gym
from llm_gym.core import Completion, Ids
from llm_gym.policies.scripted import ScriptedPolicy

# 1. A policy turns contexts (token ids) into completions, each token with its log-probability.
policy = llm_gym.make_policy(None)  # None: the embedded model; or a folder, a hub id, a transformers module
chat = llm_gym.Chat(llm_gym.load_tokenizer(None))
question = [{"role": "user", "content": "What is 21 + 34?"}]
sampling = llm_gym.Sampling(temperature=1.0, max_tokens=64)
for answer in policy.generate([chat.open(question)] * 3, sampling, seeds=[0, 1, 2]):
    print(f"{chat.text(answer.tokens)!r:40} {answer.logprobs.sum():6.2f} nats, ended by {answer.finish_reason}")

# 2. A rollout plays episodes: here 8 tasks, each 4 times, which is 8 groups for GRPO.
episodes = llm_gym.rollout("Arithmetic-v0", policy, seeds=range(8), group_size=4, sampling=sampling)
for group in llm_gym.core.group(episodes, 4):
    print(f"seed {group.seed}: rewards {group.rewards.tolist()}")

# 3. An episode is a trajectory of the ids read and sampled, never tokenised again. A trainer reads it as it is.
(trajectory,) = episodes[0].trajectories
print(f"{len(trajectory.tokens)} tokens, {len(trajectory.sampled)} of them sampled, spans {trajectory.spans}")
print(f"it ended as {episodes[0].stop_reason}; the model said {episodes[0].messages[-1]['content']!r}")

# 4. A scripted policy is the double for tests, and anything with `complete` is a policy too.
perfect = ScriptedPolicy(["I guess 50.", "25", "75"], chat)
print("scripted:", [str(e.stop_reason) for e in llm_gym.rollout("GuessNumber-v0", perfect, seeds=range(3))])


class Impatient:
    """Says whatever the model says, in at most five tokens."""

    version = 0

    async def complete(self, context: Ids, sampling: llm_gym.Sampling, *, seed: int | None = None) -> Completion:
        return await policy.complete(context, llm_gym.Sampling(max_tokens=min(5, sampling.max_tokens)), seed=seed)


episodes = llm_gym.rollout("Arithmetic-v0", Impatient(), seeds=range(8))
print("impatient:", np.mean([e.reward for e in episodes]), {str(e.stop_reason) for e in episodes})
