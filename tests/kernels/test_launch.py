"""Which tiles a GPU gets: those of its architecture, and smaller ones where it has less shared memory."""

import warnings

import pytest
import torch
from engine_contract import compiles

from longmix_kernels import attention, delta_rule, linear_attention, scatter_attention
from longmix_kernels.attention import launch as attention_launch
from longmix_kernels.delta import launch as delta_launch
from longmix_kernels.launch import known_architecture
from longmix_kernels.linear import launch as linear_launch
from longmix_kernels.runtime import UnsupportedDevice
from longmix_kernels.scatter import launch as scatter_launch
from longmix_kernels.simulated import simulated_gpu

LAUNCH = {
    "attention": attention_launch,
    "linear": linear_launch,
    "delta": delta_launch,
    "scatter": scatter_launch,
}
every_engine = pytest.mark.parametrize("engine", LAUNCH)


@pytest.mark.parametrize(
    ("architecture", "known"),
    [(80, 80), (86, 86), (87, 80), (89, 86), (90, 90), (100, 100), (103, 100), (110, 100), (120, 86), (121, 86)],
)
def test_a_gpu_takes_the_entries_with_its_instructions_and_its_shared_memory(architecture, known):
    assert known_architecture(architecture) == known


@pytest.mark.parametrize("architecture", [70, 75])
def test_a_gpu_older_than_all_entries_is_refused_with_the_way_out(architecture):
    with pytest.raises(
        UnsupportedDevice, match=rf"sm_{architecture}; allowed are sm_80 and newer; backend='blocked' runs on this one"
    ):
        known_architecture(architecture)


@every_engine
def test_configurations_shrink_step_by_step(engine):
    """A stage less first, then a side of the tile halved, down to 16; what has no tile stays as it is."""
    for config in {*LAUNCH[engine].TABLE.entries.values()}:
        sizes = config.sizes()
        while (smaller := config.smaller()) is not None:
            changed = {name for name, x in vars(config).items() if getattr(smaller, name) != x}
            assert changed == {"stages"} or (config.stages == 1 and len(changed) == 1 and changed < set(sizes))
            assert all(getattr(smaller, name) * 2 == getattr(config, name) for name in changed - {"stages"})
            config = smaller
        assert config.stages == 1
        assert all(x <= 16 and (x == sizes[name] or x == 16) for name, x in config.sizes().items())


def run(engine: str, dim: int = 64, length: int = 300) -> None:
    """A call of an engine and its gradients, in bfloat16, with documents."""
    query, key, value = (torch.zeros(1, length, 2, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    logs = torch.zeros(1, length, 2, dim, requires_grad=True)
    ids = torch.arange(length).div(100, rounding_mode="floor").int()[None]
    if engine == "attention":
        result = attention(query, key, value, document_ids=ids)
    elif engine == "linear":
        result, _ = linear_attention(query, key, value, log_decay=logs[..., 0], document_ids=ids)
    elif engine == "delta":
        result, _ = delta_rule(
            query, key, value, log_decay=logs, low_rank_read=key, low_rank_write=query, document_ids=ids
        )
    else:
        result = scatter_attention(query, key, value, logs, logs, block_size=128, past_blocks=0, document_ids=ids)
        result = result[0] if isinstance(result, tuple) else result
    result.sum().backward()


def tile(launched: dict) -> int:
    """Bytes that grow with the tile and its stages; the scans of `scatter` take all value columns in any case."""
    scan = "FEATURE_BLOCK" in launched and "ROWS" not in launched
    names = ("FEATURE_BLOCK",) if scan else ("ROWS", "KEYS", "BLOCK", "FEATURE_BLOCK", "VALUE_BLOCK")
    return max(launched.get(name, 1) for name in names) * launched["num_stages"]


@compiles
@every_engine
def test_where_a_tile_has_no_room_the_call_is_repeated_with_a_smaller_one(engine):
    with simulated_gpu(90) as whole:
        run(engine)
    with simulated_gpu(90, limit=32, takes=tile) as gpu:
        with pytest.warns(
            UserWarning, match=r"_kernel takes \d+ bytes of shared memory, and the GPU has 32: a smaller"
        ):
            run(engine)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(engine)
    assert set(gpu.launches) == set(whole.launches)
    for name, launches in gpu.launches.items():
        assert all(tile(launched) <= 32 for launched in launches), name
        for launched in (whole.launches[name][-1], launches[-1]):  # what is computed from the tile goes with it
            if "row_tiles" in launched:
                assert launched["row_tiles"] == -(-128 // launched["ROWS"])
            if engine == "attention" and name != "grad_key_value_kernel":
                assert launched["grid"] == 2 * -(-300 // launched["ROWS"])


@compiles
@every_engine
def test_a_gpu_without_room_for_the_smallest_tile_is_refused(engine):
    with (
        simulated_gpu(90, limit=8, takes=tile),
        pytest.warns(UserWarning),
        pytest.raises(
            UnsupportedDevice, match=r"_kernel takes 16 bytes of shared memory, and the GPU has 8; backend='bl"
        ),
    ):
        run(engine)


@compiles
def test_a_configuration_that_was_asked_for_is_not_replaced():
    from triton.runtime.errors import OutOfResources

    asked = attention_launch.LaunchConfig(64, 64, 4, 2)
    with (
        simulated_gpu(90, limit=32, takes=tile),
        attention_launch.TABLE.override("forward", asked),
        pytest.raises(OutOfResources),
    ):
        run("attention")


@compiles
@pytest.mark.slow
def test_tiles_shrink_until_what_is_compiled_fits():
    limit = 60_000
    with simulated_gpu(89, limit, takes=None) as gpu, pytest.warns(UserWarning):
        run("attention", dim=256, length=64)
    assert set(gpu.shared) == {"forward_kernel", "grad_query_kernel", "grad_key_value_kernel"}
    assert all(0 < x <= limit for found in gpu.shared.values() for x in found)
