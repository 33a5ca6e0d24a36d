"""Prepare the volume's custom nodes before ComfyUI is spawned. Imported only if the volume has some."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from worker.engine.custom_nodes import INSTALL_TIMEOUT_S, NodeFolders, node_packages
from worker.store.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from worker.engine.process import EngineCommand
    from worker.settings import Settings


def with_custom_nodes(settings: Settings, command: EngineCommand) -> EngineCommand:
    """Link the volume's custom nodes and install their packages, before ComfyUI imports them. A node never raises."""

    def once(key: str, done: Callable[[], bool]) -> AbstractContextManager[object]:
        from worker.store.locks import Locks, LockTiming  # noqa: PLC0415 - 60 ms, only for the worker that installs packages

        worker = settings.runpod_pod_id or socket.gethostname()
        locks = Locks(Layout(settings.volume_path), worker, LockTiming(patience_s=INSTALL_TIMEOUT_S))
        return locks.hold(key, published=done, cancel=threading.Event(), name="the custom nodes' packages")

    folders = NodeFolders.below(settings.volume_path, settings.base_dir, settings.comfyui_python)
    return replace(command, environ=node_packages(folders, once, command.environ))
