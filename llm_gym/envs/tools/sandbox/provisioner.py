"""jupyter_client's own seam for starting kernels another way: any KernelManager can use the sandbox.

manager = kernel_manager()
manager.start_kernel()
client = manager.client()
"""

from __future__ import annotations

import asyncio
import signal
from importlib.metadata import EntryPoint
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager
from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import Unicode

from llm_gym.envs.tools.sandbox import pool
from llm_gym.envs.tools.sandbox.kernels import KernelHandle
from llm_gym.envs.tools.sandbox.limits import Limits

NAME = "llm-gym-sandbox"


class SandboxProvisioner(KernelProvisionerBase):
    """Takes a kernel from the pool. The kernelspec may configure the tier: `sandbox`, `auto` by default."""

    sandbox = Unicode("auto").tag(config=True)
    handle: KernelHandle | None = None
    _key: tuple[Any, ...] = ()

    @property
    def has_process(self) -> bool:
        """Whether a kernel is held."""
        return self.handle is not None

    async def poll(self) -> int | None:
        """None while the kernel lives."""
        return None if self.handle is not None and self.handle.alive() else 1

    async def wait(self) -> int | None:
        """Returns once the kernel is gone."""
        while await self.poll() is None:
            await asyncio.sleep(0.01)
        self._end()
        return 0

    async def send_signal(self, signum: int) -> None:
        """SIGINT interrupts the cell; every other signal ends the kernel and all it started."""
        interrupted = self.handle is not None and signum == signal.SIGINT and self.handle.interrupt()
        if signum and not interrupted:
            self._end()

    async def kill(self, restart: bool = False) -> None:
        """Ends the kernel and all it started."""
        self._end()

    async def terminate(self, restart: bool = False) -> None:
        """As `kill`: nothing in a sandbox needs to say goodbye."""
        self._end()

    async def cleanup(self, restart: bool = False) -> None:
        """Nothing is left behind to clean up."""
        self._end()

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """There is no command to prepare."""
        return await super().pre_launch(cmd=[], **kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """A kernel from the pool; its connection information."""
        self._key = (KernelHandle, pool.tier(self.sandbox), Limits())
        handle: Any = pool.take(*self._key)
        connection: Any = handle.connection()
        connection["key"] = handle.key.encode()
        self.handle, self.connection_info = handle, connection
        return connection

    def _end(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.end()
            pool.give_back(*self._key)


def kernel_manager(sandbox: str = "auto") -> KernelManager:
    """A KernelManager, not yet started, whose kernel lives in the sandbox.

    Args:
        sandbox: `auto`, `required`, or a tier by name.
    """
    group = KernelProvisionerFactory.GROUP_NAME
    factory = KernelProvisionerFactory.instance()
    factory.provisioners[NAME] = EntryPoint(NAME, f"{__name__}:{SandboxProvisioner.__name__}", group)
    provisioner = {"provisioner_name": NAME, "config": {"sandbox": sandbox}}
    manager = KernelManager(kernel_name=NAME, transport="ipc")
    manager._kernel_spec = KernelSpec(
        argv=["-"], display_name="Python in a sandbox", language="python", metadata={"kernel_provisioner": provisioner}
    )
    return manager
