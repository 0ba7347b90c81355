"""Running a model's own code on real data while another trace is going on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def untraced(function: Callable[[], Result]) -> Result:
    """Calls `function` where no fake tensor, proxy or function mode is active, without gradients.

    Every mode of PyTorch belongs to a thread, so a new thread sees none of them. What `function`
    raises is raised here.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                results.append(function())
        except BaseException as error:  # noqa: BLE001 - carried over to the calling thread
            errors.append(error)

    thread = threading.Thread(target=run, name="untraced")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
