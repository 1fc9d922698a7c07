"""The rows, most valuable first, and the parts that they are run in."""

from __future__ import annotations

from gpu_rows.rows import Row

PARTS = {
    "1a": "exactness, by torch alone",
    "1b": "speed and memory of the learner",
    "1c": "whole steps",
    "2a": "vLLM in this process",
    "2b": "its memory and speed",
    "3": "several processes",
}
PART_SECONDS, ALL_SECONDS = 180, 720
"""What the limits of one part, and those of all, may add up to."""
ROWS = (
    Row("device", "1a", "names, versions, free memory, rates", "gpu_rows.exact:device", 15),
    Row("parity", "1a", "built-in engine against learner; learner against the CPU", "gpu_rows.exact:parity", 30),
    Row(
        "kernels", "1a", "attention merged by flash kernels against plain, gradients too", "gpu_rows.exact:kernels", 25
    ),
    Row("head", "1a", "loss head at 152k entries against full logits", "gpu_rows.exact:head", 20),
    Row("planner", "1a", "`token_budget=auto` against the peak of a step", "gpu_rows.exact:planner", 25),
    Row("learner 0.6B", "1b", "tok/s, MFU at 4k and 16k, full and LoRA", "gpu_rows.speed:learning_small_model", 35),
    Row("learner 4B", "1b", "the same, layers recomputed", "gpu_rows.speed:learning_large_model", 50),
    Row("checkpointing", "1b", "same gradient, peak, time", "gpu_rows.speed:checkpointing", 20),
    Row("offload", "1b", "same gradient, peak, time", "gpu_rows.speed:offload", 20, ("CUDA",)),
    Row("adamw8bit", "1b", "same gradient, peak, time", "gpu_rows.speed:optimizer_in_8_bits", 20, ("bitsandbytes",)),
    Row("demo", "1c", "30 steps of `llmgym train`: the usual curve", "gpu_rows.speed:demo", 45),
    Row("TRL", "1c", "a GRPO step beside TRL's", "gpu_rows.speed:beside_trl", 45, ("trl",)),
    Row("vLLM exact", "2a", "engine against learner, both types", "gpu_rows.engines:exact", 35, ("vllm",)),
    Row(
        "vLLM updates",
        "2a",
        "new weights under way, dated to the token",
        "gpu_rows.engines:updates",
        25,
        ("vllm",),
    ),
    Row("vLLM sync", "2a", "every mode, proven; LoRA hot swap", "gpu_rows.engines:every_sync", 80, ("vllm",)),
    Row(
        "vLLM sleep",
        "2b",
        "memory given back and taken again",
        "gpu_rows.engines:sleep",
        30,
        ("CUDA", "vllm"),
    ),
    Row("vLLM rollout", "2b", "episodes against the bare engine", "gpu_rows.engines:rollout", 40, ("vllm",)),
    Row("one rank", "3", "the collectives' backend, FSDP2 of one rank", "gpu_rows.ranks:one_process", 20),
    Row(
        "two ranks",
        "3",
        "DDP and FSDP2 against one process",
        "gpu_rows.ranks:two_processes",
        40,
        ("2 GPUs",),
    ),
    Row("server", "3", "a served engine takes new weights", "gpu_rows.ranks:server", 70, ("vllm",)),
)
