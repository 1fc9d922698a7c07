"""GRPO in one file: group-relative policy optimisation (https://arxiv.org/abs/2402.03300) on a Gymnasium environment.

Nothing of the harness is used: an environment of token ids, a transformers model, and the four verbs below it.

    python examples/grpo_single_file.py [--steps 60] [--env llm_gym/Arithmetic-v0]

`llmgym train` does the same with an engine that batches continuously, packed rows, shared prompts, vLLM, LoRA, several
processes, checkpoints and reports; this is what it computes.
"""

import argparse
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
from transformers import AutoModelForCausalLM

import llm_gym  # registers the environments
from llm_gym.embedded import PATH

PROMPTS, GROUP = 16, 8  # tasks of a step, episodes of each
MAX_TOKENS = 48  # of one completion
LEARNING_RATE, WARMUP = 2e-4, 5
CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # https://arxiv.org/abs/2503.14476
ROWS = 64  # turns in one backward pass


@dataclass
class Turn:
    """What the model was shown, what it said, and with which log-probabilities."""

    context: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray


@dataclass
class Episode:
    """The turns of one play, and what it earned."""

    turns: list[Turn]
    reward: float = 0.0


# 1. Play: sample completions of all contexts together, and step every environment with its own.


@torch.no_grad()
def sample(model, contexts, stop_ids, *, greedy=False):
    """One completion of each context: (token ids, log-probabilities), stop token included.

    Contexts stand at the right end of their rows, so that all of them go on in the same column.
    """
    width = max(map(len, contexts))
    ids = torch.zeros(len(contexts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
        ids[row, width - len(context) :] = torch.from_numpy(context.astype(np.int64))
        mask[row, width - len(context) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    said, logprobs, cache = [], [], None
    alive = torch.ones(len(contexts), dtype=torch.bool)
    while alive.any() and len(said) < MAX_TOKENS:
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache, logp = out.past_key_values, out.logits[:, -1].float().log_softmax(-1)
        ids = logp.argmax(-1, keepdim=True) if greedy else torch.multinomial(logp.exp(), 1)
        said.append(ids[:, 0])
        logprobs.append(logp.gather(1, ids)[:, 0])
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
        alive &= ~torch.isin(ids[:, 0], stop_ids)
    tokens, logprobs = torch.stack(said, 1), torch.stack(logprobs, 1)
    ended = torch.isin(tokens, stop_ids).int()
    lengths = torch.where(ended.any(1), ended.argmax(1) + 1, tokens.shape[1])
    return [(t[:n].int().numpy(), p[:n].numpy()) for t, p, n in zip(tokens, logprobs, lengths, strict=True)]


def play(model, envs, seeds, *, greedy=False):
    """One episode in each environment; an environment says itself when it is over."""
    stop_ids = torch.tensor(envs[0].unwrapped.chat.stop_ids)
    episodes = [Episode([]) for _ in seeds]
    shown = {i: env.reset(seed=int(seed))[0] for i, (env, seed) in enumerate(zip(envs, seeds, strict=False))}
    while shown:
        order = list(shown)
        for i, (tokens, logprobs) in zip(
            order, sample(model, [shown[i] for i in order], stop_ids, greedy=greedy), strict=True
        ):
            episodes[i].turns.append(Turn(shown[i], tokens, logprobs))
            observation, reward, terminated, truncated, _ = envs[i].step(tokens)
            episodes[i].reward += float(reward)
            if terminated or truncated:
                del shown[i]
            else:
                shown[i] = observation
    return episodes


# 2. Judge: an episode is as good as it is better than the others of its task.


def advantages(episodes):
    """(reward - mean of the group) / its standard deviation; 0 where all earned the same."""
    rewards = np.array([episode.reward for episode in episodes]).reshape(PROMPTS, GROUP)
    centred = rewards - rewards.mean(1, keepdims=True)
    return (centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)).ravel()


# 3. Learn: raise the log-probabilities of what earned more, within the clip.


def logprobs_of(model, turns):
    """The model's log-probabilities of what was said, [turns, longest], and which of them are real."""
    rows = [np.concatenate([turn.context, turn.tokens]) for turn in turns]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, turn) in enumerate(zip(rows, turns, strict=True)):
        ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
        real[i, len(turn.context) : len(row)] = True
    logits = model(input_ids=ids).logits[:, :-1].float()  # padding on the right: no real token sees it
    logp = logits.gather(2, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    return logp, real[:, 1:]


def learn(model, optimizer, episodes, credit):
    """One step of the optimizer; every sampled token of the step weighs the same."""
    pairs = [(turn, a) for episode, a in zip(episodes, credit, strict=True) for turn in episode.turns]
    total = sum(len(turn.tokens) for turn, _ in pairs)
    pairs = [(turn, a) for turn, a in pairs if a]  # the others have no gradient
    pairs.sort(key=lambda pair: len(pair[0].context) + len(pair[0].tokens))
    for start in range(0, len(pairs), ROWS):
        turns, a = zip(*pairs[start : start + ROWS], strict=True)
        new, real = logprobs_of(model, turns)
        old = torch.zeros_like(new)
        old[real] = torch.from_numpy(np.concatenate([turn.logprobs for turn in turns]))
        a = torch.tensor(a, dtype=torch.float32)[:, None]
        ratio = torch.exp(new - old)
        gain = torch.minimum(ratio * a, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * a)
        (-(gain * real).sum() / total).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


# 4. Measure, and repeat.


def greedy_reward(model, envs, count=256):
    """Mean reward of greedy play."""
    seeds = np.arange(2**32, 2**32 + count)
    parts = [play(model, envs, seeds[i : i + len(envs)], greedy=True) for i in range(0, count, len(envs))]
    return float(np.mean([episode.reward for part in parts for episode in part]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--env", default="llm_gym/Arithmetic-v0")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the model is small
    model = AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32)  # in bfloat16 small steps would vanish
    model.eval()  # no dropout: old and new log-probabilities must be of one function
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, max(0.0, 1 - (step - WARMUP) / (args.steps - WARMUP)))
    )

    def make(count, **kwargs):
        return [
            gymnasium.make(args.env, disable_env_checker=True, max_tokens=MAX_TOKENS, **kwargs) for _ in range(count)
        ]

    envs = make(PROMPTS * GROUP)
    unseen = make(PROMPTS * GROUP, **getattr(envs[0].unwrapped, "eval_args", {}))  # Arithmetic: split="test"
    rng = np.random.default_rng(args.seed)
    print(f"llm_gym {llm_gym.__version__}: greedy {greedy_reward(model, unseen):.3f} before")
    for step in range(args.steps):
        seeds = np.repeat(rng.integers(0, 2**31, PROMPTS), GROUP)  # a group plays one task
        episodes = play(model, envs, seeds)
        norm = learn(model, optimizer, episodes, advantages(episodes))
        decay.step()
        reward = np.mean([episode.reward for episode in episodes])
        print(f"step {step + 1:3d}  reward {reward:.3f}  gradient norm {norm:.2f}", flush=True)
    print(f"greedy {greedy_reward(model, unseen):.3f} after")


if __name__ == "__main__":
    main()
