"""Attention and delta rule on GB10, from the compiler alone: shared memory, spills, mma.sync of what hosts launch."""

import pytest

from sparktune.lab.sm121a import SHARED_LIMIT, compile_for_gb10
from sparktune.lab.sm121a_mixers import attention_launches, delta_rule_launches


def label(launch):
    return " ".join([launch.name, *(k.lower() for k, v in launch.constants.items() if v is True)])


LAUNCHES = {
    label(launch): launch
    for launch in (
        *attention_launches("8/2 D 256", 8, 2, 256),
        *attention_launches("24/4 D 256", 24, 4, 256)[-1:],
        *attention_launches("16/8 D 128", 16, 8, 128),
        *attention_launches("9/3 D 64", 9, 3, 64),
        *attention_launches("4/1 D 256 window", 4, 1, 256, 512),
        *delta_rule_launches("16/16", 16, 16),
        *delta_rule_launches("16/48", 16, 48)[-2:],
    )
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_fits_gb10(name):
    built = compile_for_gb10(LAUNCHES[name])
    print(built)
    assert built.shared_bytes <= SHARED_LIMIT
    assert built.spill_bytes == 0
    assert built.mma or not LAUNCHES[name].has_dot


def test_the_backward_at_head_dim_256_is_among_them():
    names = " ".join(LAUNCHES)
    assert "attention_dkv_kernel 8/2 D 256" in names
    assert "attention_dq_kernel 8/2 D 256" in names
