import torch

from sparsetrain.models.rotary import rotate, rotation_table
from sparsetrain.testing import assert_close


def test_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(2, 1, 12, 1, 16)
    table = rotation_table(12, 16, 100.0, torch.device("cpu"))
    scores = torch.einsum("bthd,bshd->ts", rotate(q, table), rotate(k, table))
    for distance in range(12):
        diagonal = scores.diagonal(-distance)
        assert_close(diagonal, diagonal[0].expand(len(diagonal)), rtol=1e-6, atol=1e-6)


def test_pairs_turn_by_position_times_frequency():
    x = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    x[..., 0] = x[..., 1] = 1.0
    turned = rotate(x, rotation_table(3, 4, 100.0, torch.device("cpu")))[0, :, 0]
    angles = torch.arange(3, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    assert_close(turned, torch.cat((angles.cos(), angles.sin()), dim=-1), rtol=1e-6, atol=1e-6)


def test_rotation_keeps_dtype_and_length():
    x = torch.randn(2, 5, 3, 8).bfloat16()
    turned = rotate(x, rotation_table(5, 8, 10_000.0, torch.device("cpu")))
    assert turned.dtype == torch.bfloat16
    assert_close(turned.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-2, atol=0.0)
