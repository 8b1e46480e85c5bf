import torch

from longmix.mixers.parts.rotary import rotary_angles, rotate


def test_rotation_is_multiplication_by_a_complex_number():
    x = torch.randn(2, 7, 3, 10, dtype=torch.float64)
    positions = torch.arange(7)[None]
    rotated = rotate(x, *rotary_angles(positions, 10, 100.0))
    frequency = 100.0 ** -(torch.arange(5, dtype=torch.float64) / 5)
    turn = torch.polar(torch.ones(7, 5, dtype=torch.float64), positions[0, :, None] * frequency)
    expected = torch.complex(x[..., :5], x[..., 5:]) * turn[:, None, :]
    torch.testing.assert_close(rotated, torch.cat((expected.real, expected.imag), -1), rtol=1e-6, atol=1e-6)


def test_scores_depend_on_distance_alone():
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)

    def score(i: int, j: int) -> torch.Tensor:
        at = [rotate(x, *rotary_angles(torch.tensor([[p]]), 16, 1e4)) for x, p in ((query, i), (key, j))]
        return (at[0] * at[1]).sum()

    torch.testing.assert_close(score(5, 2), score(1005, 1002), rtol=1e-3, atol=1e-3)
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3
