"""Any jupyter_client KernelManager can have its kernel in the sandbox."""

from __future__ import annotations

import pytest
from sandbox_tiers import TIERS, nothing_left

pytest.importorskip("jupyter_client")

from llm_gym.envs.tools.sandbox.provisioner import kernel_manager


@pytest.mark.parametrize("tier", TIERS)
def test_a_kernel_manager_starts_interrupts_restarts_and_ends_a_sandboxed_kernel(tier: str) -> None:
    with nothing_left(descriptors_too=False):  # jupyter_core keeps an event loop
        manager = kernel_manager(tier)
        manager.start_kernel()
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        assert _run(client, "import os; print(os.getcwd().endswith('work'), 6 * 7)") == "True 42\n"
        client.execute("print('begun', flush=True)\nwhile True: pass")
        while client.get_iopub_msg(timeout=60)["content"].get("text") != "begun\n":
            pass
        manager.interrupt_kernel()
        assert client.get_shell_msg(timeout=60)["content"]["status"] == "error"
        _run(client, "x = 1")
        client.stop_channels()
        manager.restart_kernel(now=True)
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        assert _run(client, "print('x' in globals())") == "False\n"
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        assert not manager.is_alive()
        client.context.destroy(linger=0)
        manager.context.destroy(linger=0)


def _run(client: object, code: str) -> str:
    heard: list[str] = []

    def listen(message: dict[str, dict[str, str]]) -> None:
        heard.append(message["content"].get("text", ""))

    status = "aborted"
    while status == "aborted":  # what follows a failed cell too soon is not run
        reply = client.execute_interactive(code, output_hook=listen, timeout=60, allow_stdin=False)  # type: ignore[attr-defined]
        status = reply["content"]["status"]
    assert status == "ok"
    return "".join(heard)
