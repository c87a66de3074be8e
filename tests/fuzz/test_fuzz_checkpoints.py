"""Each fuzz driver of checkpoints for a second; the long runs are started by hand."""

import pytest
from fuzz import fuzz_checkpoints, fuzz_models
from fuzz.checkpoint_fuzzing import fuzz


@pytest.mark.parametrize("driver", [fuzz_checkpoints, fuzz_models])
def test_a_second_of_fuzzing_finds_no_failure(driver):
    assert fuzz(driver.case, ["--seconds", "1", "--seed", "0"]) == []
