"""The pull towards a reference model: estimators of KL(policy || reference), and terms with its gradient.

Estimators from one sampled token: http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm_gym.harness.algorithms.streams import same_shape, suffix_sum
from llm_gym.harness.registry import by_name, want_shape


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(policy / reference): unbiased value, may be negative, large spread."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(policy / reference)^2 / 2: slightly biased value, small spread."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """reference / policy - 1 - log(reference / policy): unbiased value, never negative, small spread."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, *, kind: str) -> Tensor:
    """A per-token term [M] whose value is ratio * the estimator `kind`, and whose gradient is the reverse KL's.

    Differentiating an estimator as it stands (as many trainers do) gives, for tokens sampled from the
    policy itself: k1, zero in expectation; k3, the gradient of the FORWARD KL(reference || policy);
    k2, the gradient of the reverse KL, which is the wanted one (https://arxiv.org/abs/2506.09477).

    The reverse KL is E_policy[k1], so its gradient is E[(k1 + c) * grad log policy] for any constant c, and with
    off-policy tokens E[ratio * (k1 + c) * grad log policy], ratio = policy / sampler. Every kind has c = 0 here.
    Differentiating ratio * k1 would give c = 1: noise of mean zero that a large weight makes larger than all else, and
    that does not die out where the policy is the reference. (Nor has it mean zero under the weights of
    `importance_sampling`, which cut ratios.) ratio * k3 has c = 0 too, but as a difference of terms of size
    reference / policy, which float32 loses where that is large; so all kinds take the gradient from k1, and
    differ in what is reported.

    An estimator of your own ("package.module:function") is differentiated as it stands, times the ratio.
    What a token does to the KL of LATER states is left out; `kl_suffix_sum` has it.
    """
    same_shape(logprobs, old_logprobs, ref_logprobs)
    estimator = by_name("loss.kl", kind, KL)
    estimate: Tensor = estimator(logprobs, ref_logprobs)
    want_shape("loss.kl", estimator, estimate, logprobs.shape, "a value of each token [M]", Tensor)
    ratio = torch.exp(logprobs - old_logprobs)
    if kind not in KL:
        return ratio * estimate
    slope = ratio * k1(logprobs, ref_logprobs).detach()
    return slope + (ratio * estimate - slope).detach()


def kl_suffix_sum(logprobs: Tensor, ref_logprobs: Tensor, sequence: Tensor) -> Tensor:
    """log(policy / reference) of each token and all later ones of its sequence, summed, [M]; no gradient.

    Taken off the advantages (times a weight) it is the KL in the reward: as grad KL(sequences) =
    E[sum_t grad log p_t * sum_{s >= t} k1_s], the policy gradient then is that of the expected reward less the
    weighted KL of whole sequences. Only k1 may be used so: other estimators' sums are not that KL
    (https://arxiv.org/abs/2506.09477).
    """
    same_shape(logprobs, ref_logprobs, sequence)
    return suffix_sum(k1(logprobs.detach(), ref_logprobs), sequence)
