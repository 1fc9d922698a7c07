"""Bugs that published trainers have had, each as a change of our source and the test that must then fail.

`tests/heavy/test_mutations.py` plants them one at a time in a copy of the package.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One planted bug."""

    bug: str
    """What goes wrong."""
    file: str
    """Where it is planted, below llm_gym/."""
    old: str
    """Source text, there exactly once."""
    new: str
    """What replaces it."""
    tests: tuple[str, ...]
    """Tests below tests/ that must fail."""


MUTANTS = (
    Mutant(
        "the loss depends on how the batch is split: each micro-batch is averaged on its own",
        "harness/learner/learner.py",
        'return part["weight"] * losses',
        "return losses / batch.trained",
        (
            "harness/test_learner.py::test_the_gradient_does_not_depend_on_the_layout",
            "harness/test_presets.py::test_one_gradient_in_float64_whatever_the_layout[dapo-]",
        ),
    ),
    Mutant(
        "the denominator is that of a sequence, not of the step",
        "harness/batching/packing.py",
        '"weight": np.full(len(row.trained), weight)',
        '"weight": np.full(len(row.trained), 1.0 / len(row.trained))',
        ("harness/test_batching.py::test_weights_do_not_depend_on_budget_or_order",),
    ),
    Mutant(
        "unequal lengths: a mean of means instead of a mean over tokens",
        "harness/algorithms/normalisers.py",
        "np.full(len(counts), 1.0 / max(1, counts.sum()))",
        "1.0 / (max(1, len(counts)) * np.maximum(counts, 1))",
        ("harness/test_batching.py::test_ten_against_a_thousand_tokens",),
    ),
    Mutant(
        "a group of one or without spread gets a rounding error, amplified, or NaN",
        "harness/algorithms/advantages.py",
        "return np.where(np.isnan(returns) | (low >= high), 0.0, advantages)",
        "return np.where(np.isnan(returns), 0.0, advantages)",
        ("harness/test_advantages.py::test_a_group_without_signal_is_exactly_zero",),
    ),
    Mutant(
        "a missing reward poisons its group",
        "harness/algorithms/advantages.py",
        "mean = np.nanmean(returns, axis=1, keepdims=True)",
        "mean = np.mean(returns, axis=1, keepdims=True)",
        ("harness/test_advantages.py::test_failed_episodes_get_zero_and_leave_the_baseline_alone",),
    ),
    Mutant(
        "advantages cross groups: one baseline for all",
        "harness/algorithms/advantages.py",
        "mean = np.nanmean(returns, axis=1, keepdims=True)",
        "mean = np.nanmean(returns)",
        ("harness/test_advantages.py::test_centred_advantages_sum_to_zero",),
    ),
    Mutant(
        "a failed rollout shifts the credit of those behind it",
        "harness/batching/packing.py",
        "for g, episode in enumerate(group.episodes):",
        "for g, episode in enumerate([e for e in group.episodes if not e.stop_reason.failed]):",
        ("harness/test_batching.py::test_failed_episodes_leave_no_token_and_shift_nobody",),
    ),
    Mutant(
        "a failed rollout counts as reward 0",
        "harness/algorithms/rewards.py",
        "        if episode.stop_reason.failed:\n            continue\n",
        "",
        ("harness/test_rewards.py::test_the_arrays",),
    ),
    Mutant(
        "an episode of several rows counts several times",
        "harness/batching/packing.py",
        "counts[row.episode] += len(row.trained)",
        "counts[row.episode] = len(row.trained)",
        ("harness/test_batching.py::test_an_episode_of_three_rows_counts_once",),
    ),
    Mutant(
        "the clip is inverted for negative advantages",
        "harness/algorithms/losses.py",
        "return torch.maximum(plain, clipped), metrics",
        "return torch.where(advantages > 0, torch.maximum(plain, clipped), torch.minimum(plain, clipped)), metrics",
        ("harness/test_losses.py::test_clip_is_ppo_s_for_either_sign_of_the_advantage",),
    ),
    Mutant(
        "labels are not shifted",
        "harness/batching/packing.py",
        '"target": row.tokens[row.trained],',
        '"target": row.tokens[row.trained - 1],',
        ("harness/test_learner.py::test_log_probabilities_are_transformers_own",),
    ),
    Mutant(
        "position ids start again behind a shared prompt",
        "harness/batching/packing.py",
        "flat(np.arange(p.start, p.end) for p in pieces)",
        "flat(np.arange(p.end - p.start) for p in pieces)",
        ("harness/test_sharing.py::test_every_trained_token_keeps_its_context",),
    ),
    Mutant(
        "position ids count the padding on the left",
        "policies/builtin/forward.py",
        "logits = served.forward(torch.from_numpy(ids).to(device), seen, mask, cache)",
        "columns = torch.arange(ids.shape[1], device=device).expand(ids.shape) + seen[:, :1]\n"
        "        logits = served.forward(torch.from_numpy(ids).to(device), columns, mask, cache)",
        ("policies/test_transformers.py::TestBatching::test_company_changes_nothing",),
    ),
    Mutant(
        "packed rows leak into each other",
        "harness/model/prefix_attention.py",
        "return [[Part(span, span) for span in spans], *below]",
        "return [[Part((0, start), (0, start))], *below]",
        ("harness/test_merge.py::test_either_form_is_attention_with_a_dense_mask",),
    ),
    Mutant(
        "completions read the prompt of another group",
        "harness/model/prefix_attention.py",
        "below[depth].append(Part((last, end), (first, last)))",
        "below[depth].append(Part((last, end), (0, last - first)))",
        ("harness/test_merge.py::test_parts_cover_what_a_token_sees_once",),
    ),
    Mutant(
        "attention to a prompt and to what follows it is merged without the prompt's weight",
        "harness/model/prefix_attention.py",
        "addcmul(o_before, (before - e).exp_())",
        "add(o_before)",
        ("harness/test_merge.py::test_either_form_is_attention_with_a_dense_mask",),
    ),
    Mutant(
        "an environment takes a cut completion for an answer",
        "env.py",
        "len(action) >= self._room()",
        "len(action) > self._room()",
        ("test_env.py::test_a_cut_completion_is_graded_and_ends_the_episode",),
    ),
    Mutant(
        "pad == eos: the final stop token is masked away",
        "harness/batching/packing.py",
        """        tokens, kept = episode.sequence(i), trajectory.of_tokens("trained")\n""",
        """        tokens, kept = episode.sequence(i), trajectory.of_tokens("trained")\n"""
        """        kept[[s.stop - s.start - 1 for s in trajectory.spans[:1]]] = False\n""",
        ("harness/test_batching.py::test_tool_tokens_are_never_targets",),
    ),
    Mutant(
        "only the first of several EOS ids ends a completion",
        "models/loading.py",
        "found.update([ids] if isinstance(ids, int) else ids or ())",
        "found.update([ids] if isinstance(ids, int) else (ids or ())[:1])",
        ("policies/test_transformers.py::TestLimits::test_the_models_own_stop_tokens_are_the_default",),
    ),
    Mutant(
        "a truncated episode is taken for a terminated one",
        "rollouts/driver.py",
        "return StopReason.TOKEN_LIMIT if cut and reason is StopReason.ANSWERED else reason",
        "return reason",
        ("test_rollout.py::TestRequests::test_what_an_environment_takes_for_an_answer_is_none_if_it_was_cut",),
    ),
    Mutant(
        "truncated episodes are trained where they should be masked",
        "harness/batching/packing.py",
        "(not train_truncated and episode.stop_reason in CUT)",
        "False",
        ("harness/test_batching.py::test_a_cut_episode_is_trained_unless_masked",),
    ),
    Mutant(
        "tool tokens are trained",
        "trajectories.py",
        "        known.append(prompt[len(known.tokens) :])\n        start = len(known.tokens) - self._before(-1)\n",
        "        start = len(known.tokens) - self._before(-1)\n        known.append(prompt[len(known.tokens) :])\n",
        ("harness/test_batching.py::test_tool_tokens_are_never_targets",),
    ),
    Mutant(
        "sampled text is tokenised again",
        "env.py",
        "context = np.concatenate([self._context, action, self.chat.extend(action, list(reply.messages))])",
        "action = self.chat.encode_reply(self.chat.text(action))\n"
        "            context = np.concatenate([self._context, action, self.chat.extend(action, list(reply.messages))])",
        ("test_env.py::test_sampled_tokens_are_never_encoded_again",),
    ),
    Mutant(
        "the newline between a stop token and the next message is lost",
        "chat.py",
        "ids = self._coder.encode(text[at:])",
        'ids = self._coder.encode(text[at:].replace(plan.terminator + "\\n", plan.terminator, 1))',
        ("test_chat.py::test_the_newline_behind_a_sampled_stop_token_is_kept",),
    ),
    Mutant(
        "an empty list of tools is not None",
        "chat.py",
        "self.tools = list(tools) if tools else None",
        "self.tools = list(tools) if tools is not None else None",
        ("test_chat.py::test_empty_tools_are_no_tools",),
    ),
    Mutant(
        "history that the template rewrote is trained as if it had been the context",
        "trajectories.py",
        "if not self._sequences or not is_prefix(self._sequences[-1].tokens, prompt):",
        "if not self._sequences:",
        ("test_core.py::test_rewritten_history_branches_where_it_departs",),
    ),
    Mutant(
        "the temperature is missing from the learner's log-probabilities",
        "harness/learner/learner.py",
        '"temperature": temperature / body.scale',
        '"temperature": 1.0 / body.scale',
        ("harness/test_learner.py::test_right_after_a_sync_the_ratio_is_one_at_any_temperature",),
    ),
    Mutant(
        "top-p sampling is trained on as if it were the full distribution",
        "harness/config.py",
        "if not self.sampling.full_support:",
        "if not self.sampling.temperature > 0:",
        ("harness/test_config.py::test_mistakes_are_named",),
    ),
    Mutant(
        "logits in half precision",
        "harness/model/heads.py",
        "self.exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32",
        "self.exact = hidden.dtype",
        ("harness/test_logprobs.py::test_bfloat16_inputs_lose_nothing_more",),
    ),
    Mutant(
        "master weights in bfloat16",
        "harness/model/loading.py",
        "held, dtype=kind, device=device, config=config)",
        "held, dtype=torch.bfloat16, device=device, config=config)",
        ("harness/test_model.py::test_export_in_bfloat16_loads_as_float32",),
    ),
    Mutant(
        "weights in bfloat16 are trained, and small updates vanish",
        "harness/learner/optimizers.py",
        "if parameter.dtype in (torch.bfloat16, torch.float16):",
        "if parameter.dtype == torch.float16:",
        ("harness/test_optimizers.py::test_bfloat16_weights_would_not_move_and_are_refused",),
    ),
    Mutant(
        "a step repeated after memory ran out counts the first micro-batches twice",
        "harness/learner/memory_probe.py",
        "        model.zero_grad(set_to_none=True)\n        raise ShortOfMemory",
        "        raise ShortOfMemory",
        ("harness/test_budget.py::test_out_of_memory_halves_the_budget_and_repeats_the_step",),
    ),
    Mutant(
        "each of several processes counts on all of a machine's memory",
        "harness/learner/token_budget.py",
        "SHARE[device.type] * free / sharing",
        "SHARE[device.type] * free",
        ("harness/test_budget.py::test_processes_on_one_machine_share_its_memory",),
    ),
    Mutant(
        "a process reports the held-out loss of its own share",
        "harness/loops/sft.py",
        'learner.world.add({"loss": total}, "evaluation")["loss"]',
        "total",
        ("harness/test_sft.py::test_held_out_tokens_of_other_processes_count",),
    ),
    Mutant(
        "the sampler is sent a DoRA without its magnitudes",
        "models/folding.py",
        "    if adapter in lengths:\n",
        "    if adapter not in layer.scaling:\n",
        ("harness/test_lora.py::test_what_is_sent_and_written_is_what_is_trained[dora-float32]",),
    ),
    Mutant(
        "recomputation runs in training mode only, so never",
        "harness/model/checkpointing.py",
        "if not keep.recompute:",
        "if not (keep.recompute and self.training):",
        ("harness/test_activations.py::test_every_so_many_layers_one_runs_again",),
    ),
    Mutant(
        "k1 or k3 put in the loss as they stand",
        "harness/algorithms/kl.py",
        "return slope + (ratio * estimate - slope).detach()",
        "return estimate",
        ("harness/test_kl.py::test_every_kl_term_has_the_gradient_of_the_reverse_kl",),
    ),
    Mutant(
        "the KL in the reward leaves out the states that a token leads to",
        "harness/algorithms/kl.py",
        "return suffix_sum(k1(logprobs.detach(), ref_logprobs), sequence)",
        "return k1(logprobs.detach(), ref_logprobs)",
        ("harness/test_kl.py::test_kl_in_the_reward_has_the_gradient_of_the_kl_of_whole_sequences",),
    ),
    Mutant(
        "dropout is active in log-probabilities",
        "harness/learner/learner.py",
        "self.model, self.world = model.eval(), world or World()",
        "self.model, self.world = model.train(), world or World()",
        ("harness/test_learner.py::test_dropout_never_acts",),
    ),
    Mutant(
        "merging an adapter uses the base up",
        "models/folding.py",
        "if consume and place.around and id(tensor) not in shared:",
        "if place.around:",
        ("harness/test_model.py::test_a_hundred_merges_leave_the_base_bit_equal",),
    ),
    Mutant(
        "weights are synced in part without notice",
        "models/loading.py",
        "if missing := sorted(name for name, parameter in parameters.items() if id(parameter) not in covered):",
        "if missing := []:",
        ("policies/test_transformers.py::TestWeights::test_load_is_all_or_nothing[missing]",),
    ),
    Mutant(
        "tied embeddings are missed by a sync",
        "models/loading.py",
        "            every[name].copy_(tensor)\n",
        '            every[name].copy_(tensor) if "embed" not in name else None\n',
        ("policies/test_transformers.py::TestWeights::test_a_tied_head_follows_its_embedding",),
    ),
    Mutant(
        "the prefix cache survives a weight update",
        "policies/builtin/policy.py",
        '        self._refuse_in_flight("refresh")\n        self._engine.clear()\n',
        '        self._refuse_in_flight("refresh")\n',
        ("policies/test_transformers.py::TestWeights::test_weights_changed_in_place_are_served_after_refresh",),
    ),
    Mutant(
        "versions are mixed inside a completion without notice",
        "core.py",
        "versions[start:] = version",
        "versions[start:] = self.version",
        ("test_core.py::test_every_token_has_the_version_that_sampled_it",),
    ),
    Mutant(
        "the ratio is clipped and importance-weighted twice",
        "harness/learner/learner.py",
        "return proximal, *importance_weights(",
        "return sampler, *importance_weights(",
        ("harness/test_corrections.py::test_a_mismatch_inside_every_bound_is_counted_once",),
    ),
    Mutant(
        "old log-probabilities follow the model from update to update",
        "harness/loops/group_learner.py",
        "batches = [self.learner.compute_proximal_logprobs(batch, temperature=temperature) for batch in batches]",
        "pass",
        ("harness/test_updates.py::test_minibatches_share_out_the_groups_and_epochs_repeat_them",),
    ),
    Mutant(
        "every step replays the same tasks",
        "harness/data/tasks.py",
        "np.random.SeedSequence([run_seed, step])",
        "np.random.SeedSequence([run_seed])",
        ("harness/test_tasks.py::test_training_seeds_and_evaluation_seeds_never_meet",),
    ),
    Mutant(
        "a resumed run plays rows again, or skips some",
        "harness/data/curriculum.py",
        '        """Goes on behind them."""\n        same_rows(self.rows, state)\n        self.drawn = state["drawn"]\n',
        '        """Goes on behind them."""\n        same_rows(self.rows, state)\n',
        ("harness/test_curriculum.py::test_state_goes_on_exactly[Epochs]",),
    ),
    Mutant(
        "groups that wait for a slot are lost with the process",
        "harness/data/filters.py",
        'for env, own in enumerate(state["kept"])',
        "for env, own in enumerate([[]] * len(self.names))",
        ("harness/test_selection.py::test_a_saved_selection_goes_on_exactly[4]",),
    ),
    Mutant(
        "a left-over group is trained on twice",
        "harness/data/filters.py",
        "[self.kept[env].pop(0) for env in slots if self.kept[env]]",
        "[self.kept[env][0] for env in slots if self.kept[env]]",
        ("harness/test_selection.py::test_nothing_is_lost_and_nothing_is_counted_twice",),
    ),
    Mutant(
        "a reward that is not finite reaches the gradient",
        "env.py",
        "    return number if math.isfinite(number) else None\n",
        "    return number\n",
        ("harness/test_mixture.py::test_a_failing_reward_costs_its_episodes_and_is_counted[nan]",),
    ),
    Mutant(
        "a resumed run serves the weights it started from",
        "harness/learner/weights.py",
        "copy_weights(learner.model, ((name, split_as(tensor, like)) for name, tensor in read.items()))",
        "pass",
        ("harness/test_trainer.py::test_interrupted_and_resumed_is_uninterrupted[4-2-extra1]",),
    ),
    Mutant(
        "a resumed run forgets its optimizer",
        "harness/learner/weights.py",
        "learner.load_state_dict(torch.load(folder / STATE, weights_only=True))",
        'learner.step_count = torch.load(folder / STATE, weights_only=True)["step"]',
        ("harness/test_trainer.py::test_interrupted_and_resumed_is_uninterrupted[4-2-extra1]",),
    ),
    Mutant(
        "the schedule is stepped per micro-batch",
        "harness/learner/learner.py",
        "sums = self._backward(micro.to(self.device), temperature)",
        "sums, self.step_count = self._backward(micro.to(self.device), temperature), self.step_count + 1",
        ("harness/test_learner.py::test_the_schedule_counts_optimizer_steps_not_micro_batches",),
    ),
    Mutant(
        "metrics are means of micro-batch means",
        "harness/learner/learner.py",
        "sums.get(name, 0.0) + stream.sum()",
        "sums.get(name, 0.0) + stream.mean()",
        ("harness/test_learner.py::test_metrics_do_not_depend_on_the_split",),
    ),
    Mutant(
        "collection favours short episodes: it returns those that ended first",
        "rollouts/driver.py",
        "            episode = episodes[index] = await self._play(job)\n",
        "            episode = await self._play(job)\n            episodes[episodes.index(None)] = episode\n",
        ("test_rollout.py::TestOrder::test_episodes_are_seed_major_and_complete",),
    ),
    Mutant(
        "norms, biases and adapters are decayed",
        "harness/learner/optimizers.py",
        'elif parameter.ndim >= 2 and "lora_" not in name:',
        "elif parameter.requires_grad:",
        (
            "harness/test_learner.py::test_parameter_groups_read_back",
            "harness/test_learner.py::test_adapters_are_never_decayed_and_the_base_is_in_no_group",
        ),
    ),
    Mutant(
        "the gradient norm is measured but never clipped",
        "harness/learner/optimizers.py",
        "nn.utils.clip_grad_norm_(with_gradient, bound or math.inf)",
        "nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])",
        (
            "harness/test_learner.py::test_the_norm_after_clipping_keeps_the_bound",
            "harness/test_learner.py::test_the_step_uses_the_clipped_gradient",
        ),
    ),
    Mutant(
        "a call that blocks holds up every other episode",
        "rollouts/env_pool.py",
        'self._blocking = bool(seat.env.metadata.get("blocking", False))',
        "self._blocking = False",
        ("test_rollout.py::TestBlockingEnvironments::test_calls_are_off_the_loop_each_environment_in_one_thread",),
    ),
    Mutant(
        "the seed is accepted and ignored",
        "env.py",
        "super().reset(seed=None if seed is None else operator.index(seed))",
        "super().reset(seed=None)",
        ("test_env.py::test_the_task_is_fixed_by_the_seed_or_named_by_the_options",),
    ),
    Mutant(
        "the terminal observation is lost on autoreset",
        "vector.py",
        'final = {"final_obs": obs, "final_info": info}',
        'final = {"final_obs": None, "final_info": info}',
        ("test_vector.py::test_the_last_observation_and_info_survive_a_reset_in_the_same_step",),
    ),
    Mutant(
        "the reset observation is dropped: every context starts empty",
        "rollouts/driver.py",
        "            prompt = np.array(context, np.int32)\n",
        "            prompt = np.array(context if tale.turns else context[:1], np.int32)\n",
        ("test_rollout.py::TestOrder::test_an_episode_is_its_ledger",),
    ),
)

LATER = {
    "weights written to an engine that sleeps": "CUDA only; in-process engines have tests in tests/heavy",
    "the oldest-version bound is broken": "every rollout is synchronous yet: all tokens have the newest version",
    "math grader off the main thread; a hung grade is a silent 0": "there is only the grader of numbers yet",
}
"""Bugs of the list whose feature does not exist yet, and why."""
