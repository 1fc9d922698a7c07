"""One engine over two devices (on a CPU: two processes), in process and as a server: sampled and updated as over one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import engine_checks
import pytest
import torch

from llm_gym.harness.model.loading import load_model
from llm_gym.models.checksums import checksums

pytestmark = [pytest.mark.heavy, pytest.mark.soak]
pytest.importorskip("vllm", reason="vLLM is not installed")

SPLIT = {"tensor_parallel_size": 2, "max_model_len": 256}


def in_process(stack: ExitStack) -> Any:
    from llm_gym.policies.vllm.policy import VLLMPolicy

    return VLLMPolicy(dtype="float32", **SPLIT)


def as_a_server(stack: ExitStack) -> Any:
    from llm_gym.policies.vllm_server.policy import ServerPolicy
    from llm_gym.policies.vllm_server.process import ServerProcess

    process = stack.enter_context(ServerProcess(settings=SPLIT))
    process.wait()
    return ServerPolicy(servers=process.url)


@pytest.fixture(params=[in_process, as_a_server])
def policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    start: Callable[[ExitStack], Any] = request.param
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else each process wants a node of memory of its own
    with ExitStack() as stack:
        engine = start(stack)
        stack.callback(engine.close)
        yield engine


def test_a_split_engine_serves_what_it_is_given(policy: Any) -> None:
    model, prompts, how = load_model(None), engine_checks.contexts(16), engine_checks.sampling(1.0, "off", 32)
    for version in (0, 1):
        if version:
            with torch.no_grad():
                for number, parameter in enumerate(model.parameters()):
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                    parameter.add_(0.02 * noise)
            policy.load(model.state_dict().items(), version=version)
            assert policy.differing(checksums(model.state_dict().items(), policy.dtype)) == []
        completions = policy.generate(prompts, how, seeds=range(16))
        assert {completion.version for completion in completions} == {version}
        assert engine_checks.worst(model, prompts, completions, how) <= engine_checks.TOLERANCE
