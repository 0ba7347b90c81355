"""The two flows from end to end, each method as one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.test_adapted import inputs, llama
from tests.flow import Flow
from tests.tiers import slow


@pytest.mark.parametrize("method", ["bat", *slow("bone", "mini")])
def test_a_trained_adapter_is_deployed(method: str, tmp_path: Path) -> None:
    flow = Flow(llama(), inputs(), tmp_path)
    flow.capture().same().insert(method).same().step().fold().same().to_onnx().same()


def test_a_verb_that_fails_names_its_stage(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nothing to train") as failed:
        Flow(llama(), inputs(), tmp_path).same().step()
    assert "in the stage 'step', after ['same']" in failed.value.__notes__
